"""What `layerbank plan` says against what the extraction then takes: bytes and seconds."""

import shutil

from _common import encoder, layerbank, parser, show

made = parser(__doc__)
made.add_argument("--datasets", default="snips,wnut17,massive/en-US")
made.add_argument("--keep", default="all")
made.add_argument("--dtype", default="float16")
made.add_argument("--sample", default="20000")
arguments = made.parse_args()

for data in arguments.datasets.split(","):
    store = arguments.work / "plan-bank"
    shutil.rmtree(store, ignore_errors=True)
    flags = (
        arguments.data / data, "--encoder", encoder(), "--store", store, "--keep", arguments.keep,
        "--dtype", arguments.dtype, "--threads", str(arguments.threads),
    )  # fmt: skip
    said = layerbank("plan", *flags, "--sample", arguments.sample)
    true = layerbank("extract", *flags)
    n_bytes = said["bytes"][arguments.keep][arguments.dtype]
    show(
        check=f"plan of {data}",
        tokens=(said["kept_tokens"][arguments.keep], true["tokens"]),
        bytes=(n_bytes, true["bytes"]),
        bytes_off=n_bytes / true["bytes"] - 1,
        seconds=(said["seconds"], true["seconds"]),
        seconds_off=said["seconds"] / true["seconds"] - 1,
    )
    shutil.rmtree(store)
