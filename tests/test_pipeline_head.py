"""A choice of parts is checked before anything is computed; a head is its parts, one after the other."""

import pytest
import safetensors.torch
import tiny
import torch

from cache.place import Objects, place
from pipeline import head as module
from pipeline import parts
from pipeline.errors import PipelineError
from pipeline.head import DECODER_FOR, HeadSpec, Inputs, build_head, kind_of, plan_head

KINDS = {"label": "class", "tags": "tags", "value": "float"}


def plan(target="label", fusion="attention", decoder=None, kept=range(tiny.LAST + 1), **options):
    values = {t.name: t for t in tiny.targets(tiny.examples("dev"))}[target]
    return plan_head(
        fusion=fusion,
        decoder=decoder,
        target=values,
        kept=list(kept),
        last=tiny.LAST,
        width=tiny.WIDTH,
        options=options,
    )


def inputs(spec, seed=0):
    states = torch.randn(len(spec.layers), 5, spec.width, generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([2, 0, 3])
    return Inputs(states=states, lengths=lengths, decoded=None, decoded_lengths=lengths)


@pytest.mark.parametrize("target", KINDS)
def test_decoder_follows_the_kind_of_target(target):
    spec = plan(target)
    assert spec.decoder == DECODER_FOR[KINDS[target]]
    assert kind_of(spec) == KINDS[target]
    assert spec.n_classes == {"label": len(tiny.CLASSES), "tags": len(tiny.TAGS), "value": 1}[target]


def test_every_decoder_is_one_kinds_default():
    assert sorted(DECODER_FOR.values()) == parts.names("decoder")


def test_options_go_to_the_part_that_has_them():
    spec = plan(hidden="7", layer_norm="true", pooling="max")
    assert spec.fusion_options == {"layer_norm": True}
    assert spec.decoder_options == {"hidden": 7, "pooling": "max"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"fusion": "atention"}, "did you mean 'attention'"),
        ({"decoder": "clasifier"}, "did you mean 'classifier'"),
        ({"decoder": "tagger"}, "use --decoder classifier"),
        ({"target": "tags", "decoder": "regressor"}, "use --decoder tagger"),
        ({"target": "value", "decoder": "classifier"}, "use --decoder regressor"),
        ({"hiden": "3"}, "did you mean 'hidden'"),
        ({"layer_nrom": "true"}, "did you mean 'layer_norm'"),
        ({"target": "tags", "pooling": "mean"}, "neither fusion attention nor decoder tagger"),
        ({"hidden": "many"}, "an integer"),
        ({"fusion": "single_layer"}, "--set layer="),
        ({"fusion": "single_layer", "layer": "4"}, "the encoder has 0 to 3"),
        ({"fusion": "single_layer", "layer": "-1"}, "the encoder has 0 to 3"),
        ({"fusion": "last_layer", "kept": (0, 1)}, "reads layer 3, the bank keeps 0, 1"),
        ({"fusion": "single_layer", "layer": "2", "kept": (0, 3)}, "extract with --layers all"),
        ({"fusion": "dwatt", "kept": (0,)}, "extract with --layers all"),
        ({"fusion": "json.JSONDecoder"}, "it is no fusion"),
        ({"fusion": "os.path.join"}, "it is no fusion"),
        ({"decoder": "json.JSONDecoder"}, "it is no decoder"),
        ({"decoder": "pipeline.fusions.attention.FUSION"}, "it is no decoder"),
        ({"fusion": "no_such.module"}, "no fusion 'no_such.module'"),
    ],
    ids=str,
)
def test_wrong_choice_is_said_before_anything_is_built(asked, said):
    with pytest.raises(PipelineError) as error:
        plan(**asked)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hidden": 0}, "sizes of 1 or more"),
        ({"hidden": -3}, "sizes of 1 or more"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"fusion": "transformer", "n": 0}, "at least one layer"),
    ],
    ids=str,
)
def test_value_out_of_range_is_one_line(options, said):
    with pytest.raises(PipelineError, match="--decoder classifier") as error:
        build_head(plan(**options), seed=0)
    assert said in str(error.value)


def test_target_of_one_class_is_refused():
    values = tiny.targets(tiny.examples("dev"))[0]
    values = type(values)(name="label", kind="class", names=("only",), values=values.values * 0)
    with pytest.raises(PipelineError, match="has 1 class"):
        plan_head(fusion="average", decoder=None, target=values, kept=[0], last=3, width=8)


def test_spec_survives_json():
    spec = plan("tags", "attention", kept=(0, 2, 3), crf="true", hidden="4")
    assert HeadSpec.from_json(spec.to_json()) == spec


def test_same_seed_same_weights_whatever_the_global_state():
    spec = plan("tags", "dwatt", crf=True)
    first = build_head(spec, seed=3).state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(99)
        torch.rand(7)
        again = build_head(spec, seed=3).state_dict()
    other = build_head(spec, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_head_is_fusion_then_decoder():
    spec = plan("label", "attention", pooling="mean")
    head, given = build_head(spec, seed=0), inputs(spec)
    expected = head.decoder(head.fusion(given.states, given.lengths), given.lengths)
    assert torch.equal(head(given), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("fusion", ["affine", "attention"])
def test_a_decoder_of_one_layer_gives_the_scores_of_fusion_then_decoder(fusion, dropout):
    spec = plan("tags", fusion, layers="linear", dropout=dropout)
    head, other = build_head(spec, seed=0), build_head(spec, seed=0)
    given = inputs(spec)
    expected = other.decoder(other.fusion(given.states, given.lengths), given.lengths)
    torch.testing.assert_close(head(given), expected)


def test_decoder_sees_the_chosen_tokens_alone():
    spec = plan("tags", "attention")
    head, given = build_head(spec, seed=0), inputs(spec)
    chosen = torch.tensor([1, 3, 4])
    some = Inputs(given.states, given.lengths, chosen, torch.tensor([1, 0, 2]))
    assert torch.equal(
        head(some), head.decoder(head.fusion(given.states, given.lengths)[:, chosen], some.decoded_lengths)
    )


@pytest.mark.parametrize(
    ("asked", "reads"),
    [
        ({"target": "label"}, "first"),
        ({"target": "label", "pooling": "mean"}, "all"),
        ({"target": "tags"}, "words"),
        ({"target": "tags", "fusion": "transformer"}, "all"),
        ({"target": "label", "fusion": "transformer"}, "all"),
    ],
    ids=str,
)
def test_tokens_a_head_needs(asked, reads):
    assert build_head(plan(**asked), seed=0).reads == reads


def test_parameters_are_those_of_one_head():
    head = build_head(plan(layers="linear"), seed=0)
    assert head.n_parameters() == (tiny.WIDTH + tiny.WIDTH * 3 + 3, tiny.WIDTH)


def test_an_output_layer_made_anew_at_a_url_is_read_anew(monkeypatch, tmp_path):
    folder, fetched, read_file = f"memory://{tmp_path.name}", [], Objects.read_file

    def noted(self, key):
        fetched.append(key)
        return read_file(self, key)

    monkeypatch.setattr(Objects, "read_file", noted)
    for value in (1.0, 2.0):
        weights = {"projection.weight": torch.full((40, 50), value)}
        place(folder).put_file("layer.safetensors", safetensors.torch.save(weights))
        place(folder).put_file("zarr.json", f'{{"fingerprint": {value}}}'.encode())
        for _ in range(2):
            read = module._read_weights(f"{folder}/layer.safetensors")
            assert torch.equal(read["projection.weight"], weights["projection.weight"])
    assert fetched.count("layer.safetensors") == 2
