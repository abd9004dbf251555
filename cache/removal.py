"""Deletes a bank. Cut off half-way it is never taken for whole, and deleting goes on where it ended."""

from cache import skeleton, store
from cache.bank import is_bank
from cache.errors import CacheError
from cache.growth import NOTES
from cache.layout import OUTPUT_LAYER
from cache.place import Place, place


def check_removable(path: str) -> Place:
    """The place of a bank that may be deleted.

    Raises:
        CacheError: it is no bank, or holds something that is no part of one.
    """
    here = place(path)
    if not is_bank(here.name):
        raise CacheError(f"{path} is no bank: nothing was removed; 'layerbank list DIR' shows the banks")
    for key in here.all_keys():
        if not _is_part(key):
            raise CacheError(f"{path} also holds {key}, which is no part of the bank: move it away first")
    return here


def _is_part(key: str) -> bool:
    """Whether a bank may have stored that: beside its splits, in one, or in a note of its growth."""
    top, *below = key.split("/")
    if not below:
        return top in ("zarr.json", OUTPUT_LAYER) or top.endswith(store.PARTIAL)
    array, *chunk = below
    if array in skeleton.MEMBERS or (top in NOTES and chunk):
        return True
    return not chunk and (array == "zarr.json" or array.endswith(store.PARTIAL))


def remove(path: str) -> None:
    """Deletes a bank.

    Raises:
        CacheError: it is none, or the place refuses.
        BankLocked: another process is writing into it.
    """
    here = check_removable(path)
    with here.writing():
        try:
            # What is left of it then is known for a plan that was cut off.
            store.open_root(here.name, "r+").attrs.put(dict(skeleton.PLANNING))
            here.remove(OUTPUT_LAYER)
            here.clear()
            here.vanish()
        except OSError as error:
            raise store.disk_error(here.name, error) from error
