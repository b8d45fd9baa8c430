"""Recognition: which tensors are codes and scales, by names, dtypes and shapes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.checkpoint import BY_NAME, Name, Storage, TensorInfo, row_major
from merge_avg.scaled._config import NO_CONFIG, Config, config_of
from merge_avg.scaled._recognise import recognise
from tests.scaled.helpers import infos_of
from tests.scaled.test_compute import LAYOUTS, random_state

E4 = torch.float8_e4m3fn
BYTE = torch.uint8


def codes(*shape, dtype=E4):
    """A tensor of codes."""
    return torch.zeros(shape, dtype=BYTE).view(dtype)


def found(state, config=NO_CONFIG):
    """The keys of groups, and the reasons of refusals."""
    result = recognise(infos_of(state), config)
    refused = {name.key: why for name, why in result.refused.items()}
    return [[name.key for name in group.names] for group in result.groups], refused


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    """Each layout is recognised, wherever its module lies."""
    state = random_state(layout, 0)
    assert found({f"model.layers.0.{key}": t for key, t in state.items()}) == (
        [[f"model.layers.0.{key}" for key in state]],
        {},
    )


@pytest.mark.parametrize(
    "state",
    [
        {"w": codes(4, 4)},
        {"l.weight": torch.zeros(4, 4), "l.weight_scale": torch.ones(())},
        {"l.weight": codes(4, 4), "m.weight_scale": torch.ones(())},
        {"l.weight": codes(4, 4), "l.scale": torch.ones(4)},
        {"l.weight": codes(4, 4), "l.scaled_fp8": codes(2)},
        {"l.weight": codes(4, 4, dtype=BYTE), "l.weight_scale": torch.ones(4, 1)},
        {"image": codes(4, 4, dtype=BYTE), "image_scale": codes(4, 4, dtype=BYTE)},
        {"l.weight_packed": codes(4, 32, dtype=BYTE), "l.weight_scale": codes(4, 4)},
    ],
)
def test_no_scaled_tensors(state):
    """Codes without their scale, scales of another module and bytes of pictures are none."""
    assert found(state) == ([], {})


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"l.weight_scale_2": torch.ones(())}, "'l.weight_scale_2'"),
        ({"l.weight_global_scale": torch.ones(())}, "'l.weight_global_scale'"),
        ({"l.weight_zero_point": torch.zeros(4, 1)}, "'l.weight_zero_point'"),
        ({"l.weight_g_idx": torch.zeros(4)}, "'l.weight_g_idx'"),
        ({"l.scale_weight": torch.ones(())}, "'l.scale_weight'"),
    ],
)
def test_more_than_a_scale(more, word):
    """A second scale, a zero point or an order of columns make another scheme."""
    state = {"l.weight": codes(4, 8), "l.weight_scale": torch.ones(4, 1), **more}
    groups, refused = found(state)
    assert groups == []
    assert word in refused["l.weight"]


def test_scales_of_activations():
    """Numbers that scale something else go with the only codes of a module."""
    state = {
        "l.weight": codes(4, 8),
        "l.weight_scale": torch.ones(()),
        "l.input_scale": torch.ones(()),
        "l.scale_vector": torch.ones(8),
        "l.bias": torch.ones(4),
    }
    assert found(state) == ([["l.weight", "l.weight_scale", "l.input_scale"]], {})


def test_a_scale_of_two_tensors():
    """A scale that would be that of two tensors of codes is that of none."""
    state = {"w": codes(4, 8), "w_packed": codes(4, 8), "w_scale": torch.ones(4, 1)}
    groups, refused = found(state)
    assert groups == []
    assert refused == dict.fromkeys(
        ["w", "w_packed"], "its scales 'w_scale' are those of others too"
    )


def test_experts_in_one_module():
    """Several codes in a module have a scale each, by their names."""
    state = {
        "e.up_blocks": codes(2, 5, 3, 16, dtype=BYTE),
        "e.up_scales": codes(2, 5, 3, dtype=BYTE),
        "e.up_bias": torch.zeros(2, 5),
        "e.down_blocks": codes(2, 6, 2, 16, dtype=BYTE),
        "e.down_scales": codes(2, 6, 2, dtype=BYTE),
    }
    assert found(state) == (
        [["e.up_blocks", "e.up_scales"], ["e.down_blocks", "e.down_scales"]],
        {},
    )


def test_sizes_that_shapes_leave_open():
    """192 rows with two scales are blocks of 128 where all others may be, and else of 96."""
    state = {"a.w": codes(192, 256), "a.w_scale": torch.ones(2, 2)}
    assert recognise(infos_of(state), NO_CONFIG).groups[0].blocks.block == (128, 128)
    state |= {"b.w": codes(960, 512), "b.w_scale": torch.ones(10, 2)}
    assert [g.blocks.block for g in recognise(infos_of(state), NO_CONFIG).groups] == [
        (96, 128),
        (96, 256),
    ]
    state = {"a.w": codes(192, 256), "a.w_scale": torch.ones(2, 2)}
    assert recognise(infos_of(state), Config((96, 128))).groups[0].blocks.block == (96, 128)


@pytest.mark.parametrize(
    ("said", "config"),
    [
        ({}, NO_CONFIG),
        ({"quantization_config": None}, NO_CONFIG),
        ({"quantization_config": [1]}, NO_CONFIG),
        ({"quantization_config": {"quant_method": "mxfp4"}}, NO_CONFIG),
        ({"quantization_config": {"weight_block_size": [64, 128]}}, Config((64, 128))),
        ({"quantization_config": {"weight_block_size": [64, "x"]}}, NO_CONFIG),
        ({"quantization_config": {"weight_block_size": [0, 128]}}, NO_CONFIG),
        ({"quantization_config": {"weight_block_size": 128}}, NO_CONFIG),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "format": "float-quantized",
                }
            },
            NO_CONFIG,
        ),
    ],
)
def test_configurations(said, config):
    """A configuration tells the size of blocks; what is no size is no news."""
    assert config_of(said) == config


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", ["fp8"], {"a": 1}])
def test_other_methods(method):
    """Other schemes are told by their names, whatever these are."""
    config = config_of({"quantization_config": {"quant_method": method}})
    assert repr(method) in config.trouble
    state = {"l.weight": codes(4, 8), "l.weight_scale": torch.ones(4, 1)}
    groups, refused = found(state, config)
    assert groups == []
    assert refused == {"l.weight": config.trouble}


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 16, 32, 128, 200]), max_size=4).map(tuple)
KINDS = st.sampled_from(["float8_e4m3fn", "float8_e5m2", "uint8", "float32", "bfloat16", "int8"])
KEYS = st.sampled_from(
    [
        "w",
        "w_scale",
        "w_scale_inv",
        "scale_w",
        "scale",
        "w_blocks",
        "w_scales",
        "w_packed",
        "x_scale",
    ]
)
SIZES = st.sampled_from([(), (128, 128), (1, 32), (16, 3)])


@given(st.dictionaries(KEYS, st.tuples(KINDS, SHAPES), max_size=5), SIZES)
def test_whatever_lies_beside_each_other(layout, sizes):
    """What is recognised has a scale for each block, and each element in a block."""
    tensors = {}
    for key, (kind, shape) in layout.items():
        dtype, storage = BY_NAME[kind], Storage(key, 0, math.prod(shape) * BY_NAME[kind].itemsize)
        info = TensorInfo((key,), dtype, shape, row_major(shape), 0, storage)
        tensors[Name((), key)] = info
    result = recognise(tensors, Config(sizes))
    for group in result.groups:
        codes, scales = (tensors[name] for name in group.names[:2])
        assert group.blocks.count == scales.numel
        assert group.blocks.numel == math.prod(group.shape) == codes.numel * group.form.in_byte
        strips = [*group.blocks.strips(64)]
        assert sum(strip.blocks for strip in strips) == scales.numel
        assert sum(strip.rows * strip.columns for strip in strips) == group.blocks.numel
    names = [name for group in result.groups for name in group.names]
    assert len({*names}) == len(names)
