import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from encoders import FAMILIES, POSITIONS, SENTENCES, WIDTH, copy_of, tiny_encoder
from transformers import AutoTokenizer
from transformers.utils import logging

from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.tokens import tokenize


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def load(folder, **options):
    return Encoder(str(folder), device="cpu", **options)


def states_of(encoder, texts=SENTENCES, max_length=30, budget_tokens=64):
    tokens = tokenize(encoder.tokenizer, [(list(texts), None)], max_length=max_length)
    out = torch.zeros(encoder.record.n_layers, len(tokens.input_ids), encoder.record.width)
    encoder.encode(
        tokens,
        np.arange(len(texts)),
        kept=tokens.kept("all"),
        layers=range(encoder.record.n_layers),
        start=tokens.start[:-1],
        out=out,
        budget_tokens=budget_tokens,
    )
    return out


def refusal(folder, **options):
    """What is said of an encoder that cannot be used, which must be one line and no traceback."""
    with pytest.raises(PipelineError) as caught:
        load(folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"--encoder {folder}: ")
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_trains_and_nothing_drops_out(family):
    encoder = load(tiny_encoder(family))
    assert encoder.record.n_layers == 3
    assert encoder.record.width == WIDTH
    first = states_of(encoder)
    assert torch.equal(first, states_of(encoder))
    assert not first.requires_grad
    modules = list(encoder._model.modules())
    assert not any(module.training for module in modules)
    assert not any(weight.requires_grad for weight in encoder._model.parameters())


def test_no_graph_is_kept_even_where_a_gradient_is_asked_for():
    encoder = load(tiny_encoder())
    with torch.enable_grad():
        states = encoder._forward(np.array([[3, 4]]), np.zeros((1, 2)), np.array([2]), [0, 1, 2])
    assert all(state.is_inference() for state in states)


def test_attention_is_the_fused_one_where_the_architecture_has_it():
    assert load(tiny_encoder("bert"))._model.config._attn_implementation == "sdpa"
    assert load(tiny_encoder("deberta_v2"))._model.config._attn_implementation == "eager"


def test_a_decoder_holds_no_keys_and_values():
    encoder = load(tiny_encoder("llama"))
    ids = torch.tensor([[3, 4]])
    assert encoder._model(input_ids=ids).past_key_values is None


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_tokens_as_positions_are_encoded_and_no_more_are_taken(family):
    encoder = load(tiny_encoder(family))
    if family == "t5":
        assert encoder.positions is None
        assert encoder.max_length(None) == 512
        assert encoder.max_length(100_000) == 100_000
        return
    assert encoder.positions == POSITIONS
    assert encoder.max_length(None) == encoder.max_length(POSITIONS) == POSITIONS
    assert encoder.max_length(7) == 7
    with pytest.raises(PipelineError, match=f"--max-length 41: the encoder has {POSITIONS} positions"):
        encoder.max_length(POSITIONS + 1)
    long = " ".join(SENTENCES)
    assert states_of(encoder, [long], max_length=POSITIONS).shape[1] == POSITIONS


def test_the_tokenizers_own_bound_is_the_default_and_512_the_most(tmp_path):
    folder = copy_of("t5", tmp_path / "short")
    AutoTokenizer.from_pretrained(folder, model_max_length=20).save_pretrained(folder)
    assert load(folder).max_length(None) == 20
    assert load(folder).max_length(30) == 30
    AutoTokenizer.from_pretrained(folder, model_max_length=2000).save_pretrained(folder)
    assert load(folder).max_length(None) == 512


def test_a_tokenizer_that_cuts_the_beginning_cuts_the_end_here(tmp_path):
    folder = copy_of("bert", tmp_path / "left")
    left = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    left.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).truncation_side == "left"
    tokens = tokenize(load(folder, words=True).tokenizer, [([["the", "quick", "fox"]], None)], max_length=3)
    assert tokens.word_id.tolist() == [-1, 0, -1]
    assert (tokens.words_cut, tokens.words_empty) == (2, 0)


def without(prefix):
    def change(weights):
        for name in [name for name in weights if name.startswith(prefix)]:
            del weights[name]

    return change


@pytest.mark.parametrize(
    ("family", "prefix", "named"),
    [
        (
            "bert",
            "encoder.layer.1.output.dense.weight",
            "lacks 1 weights, first encoder.layer.1.output.dense",
        ),
        ("bert", "embeddings.word_embeddings", "lacks 1 weights, first embeddings.word_embeddings.weight"),
        ("t5", "encoder.block.1.layer.0.SelfAttention.q", "first encoder.block.1.layer.0.SelfAttention.q"),
        ("t5", "shared", "embed_tokens.weight"),
        ("gpt2", "ln_f", "lacks 2 weights, first ln_f.bias"),
    ],
)
def test_a_checkpoint_without_some_weights_is_refused_in_one_line(tmp_path, capfd, family, prefix, named):
    said = refusal(copy_of(family, tmp_path / "partial", without(prefix)))
    assert "its checkpoint lacks" in said
    assert named in said
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_without_a_pooler_makes_the_same_states_and_fingerprint_every_time(tmp_path):
    folder = copy_of("bert", tmp_path / "headless", without("pooler."))
    whole = load(tiny_encoder())
    for _ in range(2):
        encoder = load(folder)
        assert encoder.record.weights_sha256 == whole.record.weights_sha256
        assert torch.equal(states_of(encoder), states_of(whole))


def test_a_checkpoint_of_a_t5_encoder_alone_is_the_encoder_of_the_whole(tmp_path):
    folder = copy_of("t5", tmp_path / "alone", without("decoder."))
    whole, alone = load(tiny_encoder("t5")), load(folder)
    assert alone.record.weights_sha256 == whole.record.weights_sha256
    assert torch.equal(states_of(alone), states_of(whole))


def test_a_checkpoint_with_a_head_and_its_prefix_is_that_encoder(tmp_path):
    folder = copy_of("bert", tmp_path / "tagger")
    transformers.BertForTokenClassification.from_pretrained(folder, num_labels=3).save_pretrained(folder)
    assert load(folder).record.weights_sha256 == load(tiny_encoder()).record.weights_sha256


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("pooler.dense.weight", True),
        ("embeddings.word_embeddings.weight", False),
        ("encoder.layer.1.output.LayerNorm.bias", False),
    ],
)
def test_the_fingerprint_follows_the_weights_that_take_part(tmp_path, name, same):
    def change(weights):
        weights[name].view(-1)[0] += 1e-3

    changed = load(copy_of("bert", tmp_path / "changed", change)).record.weights_sha256
    assert (changed == load(tiny_encoder()).record.weights_sha256) == same


def test_the_fingerprint_is_of_the_weights_and_not_of_the_folder(tmp_path):
    one, two = load(tiny_encoder()), load(copy_of("bert", tmp_path / "elsewhere"))
    assert one.record.name != two.record.name
    assert one.record.weights_sha256 == two.record.weights_sha256
    assert one.tokenizer_sha256 == two.tokenizer_sha256


def test_the_fingerprint_tells_families_apart():
    assert len({load(tiny_encoder(family)).record.weights_sha256 for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("name", ["no/such/folder", "no-such-encoder", "nobody/nothing"])
def test_an_encoder_that_is_nowhere(name):
    assert "no such directory, and its tokenizer cannot be had from the Hub" in refusal(name)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\x00junk" * 50, None])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_or_absent_file(tmp_path, file, content):
    folder = copy_of("bert", tmp_path / "damaged")
    if content is None:
        Path(folder, file).unlink()
    else:
        Path(folder, file).write_bytes(content)
    refusal(folder)


def test_weights_cut_short(tmp_path):
    folder = copy_of("bert", tmp_path / "short")
    file = Path(folder, "model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert "its encoder cannot be loaded" in refusal(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_tokenizer_files(tmp_path, family):
    folder = copy_of(family, tmp_path / "mute")
    for file in Path(folder).glob("*token*"):
        file.unlink()
    assert "tokenizer" in refusal(folder)


def test_an_empty_folder(tmp_path):
    refusal(tmp_path)


def _vision(folder):
    transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32
        )
    ).save_pretrained(folder)


def _two_towers(folder):
    tower = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.CLIPConfig(text_config=tower, vision_config={"image_size": 32, **tower})
    transformers.CLIPModel(config).save_pretrained(folder)


@pytest.mark.parametrize("build", [_vision, _two_towers])
def test_a_model_of_something_else_than_text(tmp_path, build):
    folder = copy_of("bert", tmp_path / "other")
    build(folder)
    assert "it gives no states of text" in refusal(folder)


def test_an_encoder_whose_layers_differ_in_width_is_refused(tmp_path):
    folder = copy_of("bert", tmp_path / "projected")
    config = transformers.OPTConfig(
        vocab_size=200, hidden_size=16, word_embed_proj_dim=8, ffn_dim=8, num_hidden_layers=1,
        num_attention_heads=2, do_layer_norm_before=False, max_position_embeddings=8,
    )  # fmt: skip
    transformers.OPTModel(config).save_pretrained(folder)
    assert "its layers have shapes [(1, 2, 8), (1, 2, 16)] on a text of 2 tokens" in refusal(folder)


def test_an_unknown_architecture_is_refused(tmp_path):
    folder = copy_of("bert", tmp_path / "unknown")
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps({**config, "model_type": "teapot"}))
    assert "teapot" in refusal(folder)


def test_a_pad_token_that_only_the_tokenizer_has_does_no_harm(tmp_path):
    folder = copy_of("gpt2", tmp_path / "padded")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert torch.equal(states_of(load(folder)), states_of(load(tiny_encoder("gpt2"))))


def test_a_tokenizer_with_more_tokens_than_the_encoder_has_embeddings(tmp_path):
    folder = copy_of("bert", tmp_path / "misfit")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    encoder = load(folder)
    assert torch.equal(states_of(encoder), states_of(load(tiny_encoder())))
    last = len(tokenizer) - 1
    with pytest.raises(
        PipelineError, match=f"token {last}, its embeddings end at {last - 1}: the two do not"
    ):
        states_of(encoder, ["a zebra"])


def test_segments_go_only_to_an_encoder_that_asks_for_them(tmp_path):
    folder = copy_of("distilbert", tmp_path / "mixed")
    AutoTokenizer.from_pretrained(tiny_encoder("bert")).save_pretrained(folder)
    encoder = load(folder)
    assert "token_type_ids" in encoder.tokenizer.model_input_names
    seen = []
    encoder._model.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    states_of(encoder)
    assert all(given.keys() == {"input_ids", "attention_mask", "output_hidden_states"} for given in seen)


def test_too_little_memory_names_the_flag_that_helps(monkeypatch):
    encoder = load(tiny_encoder())

    def fail(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")

    monkeypatch.setattr(encoder._model, "forward", fail)
    with pytest.raises(PipelineError, match=r"cpu has too little memory for a batch of .*--batch-tokens"):
        states_of(encoder)


def test_loading_says_nothing_and_leaves_the_logging_of_others_as_it_was(tmp_path, capfd):
    folder = copy_of("bert", tmp_path / "headless", without("pooler."))
    before = logging.get_verbosity()
    load(folder)
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_of_the_batches_changes_nothing_but_rounding(family):
    encoder = load(tiny_encoder(family))
    texts = [*SENTENCES, "", "the", "fox jumps"]
    alone = states_of(encoder, texts, budget_tokens=1)
    for budget in (30, 100, 10_000):
        torch.testing.assert_close(
            states_of(encoder, texts, budget_tokens=budget), alone, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    ("setting", "value", "same"),
    [
        ("hidden_act", "relu", False),
        ("layer_norm_eps", 1e-5, False),
        ("is_decoder", True, False),
        ("hidden_dropout_prob", 0.3, True),
        ("initializer_range", 0.5, True),
        ("id2label", {"0": "x"}, True),
        ("a_setting_of_tomorrow", 3, False),
    ],
)
def test_the_fingerprint_follows_the_settings_that_may_change_states(tmp_path, setting, value, same):
    folder = copy_of("bert", tmp_path / "changed")
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps({**config, setting: value}))
    changed = load(folder).record.weights_sha256
    assert (changed == load(tiny_encoder()).record.weights_sha256) == same
