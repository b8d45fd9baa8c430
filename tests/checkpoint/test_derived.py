"""Values that follow from others: told by shapes, with names to break ties."""

import re

import pytest

from merge_avg.checkpoint import (
    BY_NAME,
    Name,
    Storage,
    low_rank,
    parts_note,
    refuse_quantised,
    unit_or_mask,
)
from merge_avg.checkpoint._derived import _scales_blocks, _scales_packed
from merge_avg.errors import MergeError
from merge_avg.plan._alignment import without
from tests.plan.helpers import info, rows_of

SHORT = {"f8": "float8_e4m3fn", "f16": "float16", "f": "float32", "i8": "int8", "u8": "uint8"}
SHORT |= {"i32": "int32", "i64": "int64", "b": "bool", "e8": "float8_e8m0fnu"}


def tensors(text):
    """Tensors such as "l.weight f8 4,4; l.scale f" by their names."""
    found = {}
    for one in text.split(";"):
        key, dtype, *shape = one.split()
        extents = tuple(map(int, shape[0].split(","))) if shape else ()
        storage = Storage(key, 0, 1 << 24)
        found[Name((), key)] = info(key, storage, 0, extents, dtype=BY_NAME[SHORT[dtype]])
    return found


def refuse(some, skipped=()):
    layouts, _ = rows_of({name.key: one for name, one in some.items()})
    refuse_quantised(layouts[0], some, {Name((), key) for key in skipped})


# Codes by whoever writes them, with the spelling of their scales.
CODES = {
    "ComfyUI": "l.weight f8 64,32; l.scale_weight f; scaled_fp8 f8 2",
    "DeepSeek": "l.weight f8 256,300; l.weight_scale_inv f 2,3",
    "torchao": "l.weight f8 64,32; l.weight_scale f16 64,1",
    "by column": "l.w f8 64,32; l.w_s f16 32",
    "by block": "l.codes i8 64,32; l.s f16 64,2",
    "MXFP8": "l.weight f8 64,32; l.s e8 64,1",
    "MXFP4": "e.up_blocks u8 8,64,90,16; e.up_scales u8 8,64,90; e.up_bias f16 8,64",
    "bitsandbytes, 8 bits": "l.weight i8 64,32; l.SCB f 64",
    "bitsandbytes, 4 bits": "l.weight u8 1024,1; l.weight.absmax u8 32; l.weight.quant_map f 16",
    "GPTQ": "l.qweight i32 8,32; l.qzeros i32 2,4; l.scales f16 2,32; l.g_idx i32 64",
    "AWQ": "l.qweight i32 64,4; l.scales f16 2,32",
    "compressed-tensors": "l.weight_packed i32 64,4; l.weight_scale f16 64,1",
    "HQQ": "l.W_q u8 32,32; l.scale f16 64,1; l.zero f16 64,1; l.bias f16 64",
    "quanto": "l.weight._data i8 64,32; l.weight._scale f16 64,1; l.input_scale f",
    "experts": "e.up f8 8,64,32; e.down f8 8,32,64; e.up_scale f 8,1,1; e.down_scale f 8,1,1",
    "one element": "l.weight f8 4; l.qscale f 1",
    "any name": "l.W f8 64,32; l.k f 64; l.bias f16 64",
    "packed, one scale": "l.weight_packed i32 64,4; l.global f 1; l.weight_scale f16 1",
    "the whole file": "l.weight f8 64,32; scaled_fp8 f8 2",
}


@pytest.mark.parametrize("writer", CODES)
def test_codes_are_refused_beside_a_scale_of_any_name(writer):
    """Small numbers that a sibling or child scales have no mean; the error names them."""
    some = tensors(CODES[writer])
    codes = next(iter(some)).key
    with pytest.raises(MergeError, match=rf"^f.pt: tensor '{re.escape(codes)}' holds quantised"):
        refuse(some)
    refuse(some, skipped=[name.key for name in some])


@pytest.mark.parametrize(
    "text",
    [
        "l.weight f8 64,32; l.bias f16 64; n.weight f16 64; n.bias f16 64; logit_scale f",
        "attn.in_proj_weight f8 96,32; attn.in_proj_bias f 96; attn.out.weight f8 32,32",
        "projection f8 64,32; positions f8 77,32; logit_scale f; classes f 7",
        "h.attn.bias u8 1,1,64,64; h.attn.masked_bias f; h.attn.c.weight f 64,64",
        "l.mask u8 64,32; l.weight f 64,32; l.alpha f 64; l.bias f 64",
        "q.fake_quant_enabled u8 1; q.scale f 1; q.zero_point i32 1",
        "l.position_ids i32 1,512; l.table f 1,256; l.bias_table f 169,6",
        "edge_index i32 2,50; x f 50,8; scale f",
        "l.weight i64 64,32; l.scales f 64",
        "l.weight f16 64,32; l.scales f 64",
        "l.weight b 64,32; l.scales f 64",
        "l.bias i8 64; l.scales f 64",
        "q.weight f8 64,32; q.lora_A f16 4,32; q.lora_B f16 64,4",
        "weight f8 64,32",
        "scaled_fp8 f8 2; l.weight f 64,32",
        "l.a u8 64,32; l.b u8 64",
        "l.codes f8 64; l.k f",
        "l.weight f8 64,32; l.k f 5",
        "l.weight f8 64,32; l.weight_more f 5",
    ],
)
def test_small_numbers_without_a_scale_pass(text):
    """Biases, norms elsewhere, a scale of logits, masks and indices make no quantised weights."""
    refuse(tensors(text))


@pytest.mark.parametrize(
    ("ours", "theirs", "blocks", "packed"),
    [
        ((64,), (64, 32), True, False),
        ((32,), (64, 32), True, False),
        ((33,), (64, 32), False, False),
        ((64, 1), (64, 32), True, True),
        ((1, 1, 32), (64, 32), True, False),
        ((2, 4), (64, 32), True, True),
        ((2, 3), (256, 301), True, False),  # the last block of 128 is shorter
        ((2, 7), (256, 300), False, False),
        ((2, 3, 4), (256, 300), False, False),
        ((1, 1), (64, 32), True, True),
        ((0, 3), (256, 300), False, False),
        ((4,), (4,), False, False),
        ((64,), (64, 1), False, False),
        ((64, 32), (64, 32), False, False),
        ((2, 32), (8, 32), True, True),
        ((4, 32), (8, 32), True, True),  # a scale for 16 codes of 4 bits
        ((5, 32), (8, 32), False, False),
        ((3, 64), (24, 32), False, True),
        ((5, 32), (12, 32), False, False),
    ],
)
def test_the_shapes_of_scales(ours, theirs, blocks, packed):
    """One a row, a column or a block of codes; packed codes are up to eight to an integer."""
    assert (_scales_blocks(ours, theirs), _scales_packed(ours, theirs)) == (blocks, packed)


def test_a_scale_of_the_same_name_in_another_state_dict_counts():
    """{"model": codes, "scales": scales} is quantised too."""
    codes, scale = tensors("l.weight f8 64,32"), tensors("l.weight f")
    some = {Name(("model",), name.key): one for name, one in codes.items()}
    some |= {Name(("scales",), name.key): one for name, one in scale.items()}
    with pytest.raises(MergeError, match=r"tensor 'model\.l\.weight' holds quantised codes"):
        refuse_quantised(rows_of({"a": next(iter(some.values()))})[0][0], some)


# Pairs of factors, and how many there are.
FACTORS = {
    "PEFT": ("q.lora_A.weight f 4,32; q.lora_B.weight f 48,4", 1),
    "adapters of PEFT": ("q.lora_A.x.weight f 4,32; q.lora_B.x.weight f 48,4; q.weight f 48,32", 1),
    "two adapters": ("q.lora_A.x f 4,9; q.lora_B.x f 9,4; q.lora_A.y f 2,9; q.lora_B.y f 9,2", 2),
    "embeddings": ("e.lora_embedding_A f 4,99; e.lora_embedding_B f 32,4", 1),
    "kohya": ("q.lora_down.weight f 4,32; q.lora_up.weight f 48,4; q.alpha f", 1),
    "kohya, convolutions": ("c.lora_down.weight f 4,16,3,3; c.lora_up.weight f 32,4,1,1", 1),
    "diffusers": ("q_lora.down.weight f 4,32; q_lora.up.weight f 48,4; q.x f 1", 1),
    "torchtune": ("q.weight f 48,32; q.lora_a.weight f 4,32; q.lora_b.weight f 48,4", 1),
    "loralib, fused": ("q.weight f 96,32; q.lora_A f 8,32; q.lora_B f 64,4", 1),
    "LoHa": ("q.hada_w1_a f 48,4; q.hada_w1_b f 4,32; q.hada_w2_a f 48,4; q.hada_w2_b f 4,32", 6),
    "LoKr": ("q.lokr_w1 f 4,4; q.lokr_w2 f 12,8", 1),
    "minLoRA": (
        (
            "q.parametrizations.weight.original f 48,32; q.parametrizations.weight.0.A f 4,32; "
            "q.parametrizations.weight.0.B f 48,4"
        ),
        1,
    ),
    "a name of one's own": (
        "q.weight f 48,32; q.bias f 48; q.into.weight f 4,32; q.to.weight f 48,4",
        1,
    ),
    "x @ A @ B": ("q.weight f 48,32; q.P f 32,4; q.Q f 4,48", 1),
    "beside a layer": ("q.linear.weight f 48,32; q.linear.bias f 48; q.A f 4,32; q.B f 48,4", 1),
    "A and B alone": ("q.A f 4,32; q.B f 32,4", 1),
    "down and up alone": (
        "a.down.weight f 2,8; a.up.weight f 8,2; b.down.weight f 2,8; b.up.weight f 8,2",
        2,
    ),
    "any names alone": (
        "a.x.weight f 4,32; a.y.weight f 32,4; b.x.weight f 4,64; b.y.weight f 32,4",
        2,
    ),
    "A alone": ("l.lora_A.weight f 2,3", 1),
    "factors of up and down": (
        "m.up.lora_A f 4,32; m.up.lora_B f 64,4; m.down.lora_A f 4,64; m.down.lora_B f 32,4",
        2,
    ),
}


@pytest.mark.parametrize("writer", FACTORS)
def test_factors_are_found_in_any_spelling(writer):
    """Pairs with one inner dimension, beside a full matrix, in place of it, or by their names."""
    text, count = FACTORS[writer]
    assert len(low_rank(tensors(text))) == count


@pytest.mark.parametrize(
    "text",
    [
        "m.fc1.weight f 8,64; m.fc1.bias f 8; m.fc2.weight f 64,8; m.fc2.bias f 64; w f 64,64",
        "m.fc1.weight f 8,64; m.fc1.bias f 8; m.fc2.weight f 64,8; m.fc2.bias f 64",
        "encoder.weight f 8,64; decoder.weight f 64,8",
        "encoder.0.weight f 16,64; encoder.2.weight f 4,16; decoder.0.weight f 16,4",
        "m.gate.weight f 176,64; m.up.weight f 176,64; m.down.weight f 64,176; e.weight f 999,64",
        "m.up.weight f 256,64; m.down.weight f 64,256; a.q.weight f 64,64; a.o.weight f 64,64",
        "e.0.up.w f 8,64; e.0.down.w f 64,8; e.1.up.w f 8,64; e.1.down.w f 64,8",
        "a.q.weight f 64,64; a.k.weight f 16,64; a.v.weight f 16,64; a.o.weight f 64,64",
        (
            "a.q_a.weight f 8,64; a.q_b.weight f 96,8; a.kv_a.weight f 9,64; a.kv_b.weight f 96,7; "
            "a.o.weight f 64,96"
        ),
        (
            "b.conv1.weight f 8,16,1,1; b.conv2.weight f 8,8,3,3; b.conv3.weight f 32,8,1,1; "
            "b.downsample.0.weight f 32,16,1,1; b.bn1.weight f 8"
        ),
        "w f 3000; v f 64,3",
        "a.x.weight f 4,31; a.y.weight f 31,4; b.x.weight f 4,31; b.y.weight f 31,4",
        "l.flora_Ab f 2,3",
        "a.lora_up.x f 3",
    ],
)
def test_layers_of_networks_are_no_factors(text):
    """Bottlenecks, autoencoders, gated layers, attention and residual blocks have no low rank."""
    assert low_rank(tensors(text)) == frozenset()


@pytest.mark.parametrize(
    ("text", "certain", "doubtful"),
    [
        ("weight_orig f 8,4; weight_u f 8; weight_v f 4; bias f 8", "weight_u weight_v", ""),
        ("c.weight_bar f 8,4,3,3; c.weight_u f 8; c.weight_v f 36", "c.weight_u c.weight_v", ""),
        ("c.weight_orig f 4,8,3,3; c.weight_u f 8; c.weight_v f 36", "c.weight_u c.weight_v", ""),
        (
            (
                "p.parametrizations.weight.original f 8,4; p.parametrizations.weight.0._u f 8; "
                "p.parametrizations.weight.0._v f 4; p.bias f 8"
            ),
            "p.parametrizations.weight.0._u p.parametrizations.weight.0._v",
            "",
        ),
        ("c.weight f 8,4,3,3; c.u0 f 1,8; c.sv0 f 1; c.bias f 8", "", "c.u0"),
        ("W_enc f 4,8; b_enc f 8; W_dec f 8,4; b_dec f 4", "", "b_enc b_dec"),
        ("l.weight_orig f 8,4; l.weight_mask f 8,4; l.bias f 8", "", "l.weight_mask"),
        (
            "parametrizations.weight.original f 8,8; parametrizations.weight.0.base f 8,8",
            "",
            "parametrizations.weight.0.base",
        ),
        ("l.weight f 8,4; l.bias f 8; n.weight f 8; n.bias f 8; n.running_mean f 8", "", ""),
        ("a.in_proj_weight f 24,8; a.in_proj_bias f 24; r.bias_ih_l0 f 8; r.w_l0 f 8,8", "", ""),
        ("l.weight_orig f 8,4; l.weight_mask b 8,4", "", ""),
        ("l.weight f 8,4; l.x_u f 8", "", "l.x_u"),
        (
            "parametrizations.weight.original f 8,8; parametrizations.weight.0.base f 8",
            "",
            "parametrizations.weight.0.base",
        ),
        ("l.column f 8,1; l.stat f 8", "", ""),
        ("m.a f 8,4; m.b f 5,6; m.x f 4; m.y f 5; m.z f 7", "", "m.x m.y"),
    ],
)
def test_what_may_be_of_unit_length_or_a_mask(text, certain, doubtful):
    """Vectors of rows or columns and masks are looked at; the API of torch makes some certain."""
    found = unit_or_mask(tensors(text))
    assert {name.key for name in found if found[name]} == set(certain.split())
    assert {name.key for name in found if not found[name]} == set(doubtful.split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("c.weight_g f 8,1; c.weight_v f 8,4", "'c.weight'"),
        (
            "c.parametrizations.weight.original0 f 8,1; c.parametrizations.weight.original1 f 8,4",
            "'c.weight'",
        ),
        ("parametrizations.w.original f 8,8; parametrizations.w.0.base f 8,8", "'w'"),
        (
            (
                "a.w_g f 8,1; a.w_v f 8,4; b.parametrizations.x.original f 8,8; "
                "c.parametrizations.x.original f 8,8"
            ),
            "'a.w' and 2 more",
        ),
        ("p.parametrizations.w.original f 8,8; p.parametrizations.w.0.mask f 8,8", None),
        ("l.weight f 8,4; l.bias f 8", None),
    ],
)
def test_weights_that_are_computed_from_parts_are_noted(text, said):
    """The mean of lengths and directions is not that of weights; that of masked ones is."""
    notes = list(parts_note(tensors(text)))
    assert [f"{said} is computed from parts" in note for note in notes] == [True] * bool(said)


@pytest.mark.parametrize(
    ("key", "option"),
    [
        ("head.weight", "--exclude 'head.*'"),
        ("val_metrics.acc.confmat", "--exclude 'val_metrics.*'"),
        ("model.test_metric.confmat", "--exclude 'model.test_metric.*'"),
        ("queue", "--exclude 'queue'"),
        ("metric", "--exclude 'metric'"),
    ],
)
def test_the_option_that_leaves_a_tensor_out(key, option):
    """A metric goes with all of its collection, another tensor with its module."""
    assert without(Name((), key)) == option
