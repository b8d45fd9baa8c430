"""Scaled weights as their libraries write them: what these load of a mean is the mean."""

import copy
import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import run_command
from tests.scaled.helpers import plain

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("default")]


def averaged(folder, *options):
    """Average two folders, and return the path of the result, which verifies."""
    out = folder / "-".join(["out", *options])
    done = run_command(folder / "0", folder / "1", "-o", out, *options)
    assert done.returncode == 0, done.stderr
    assert run_command("verify", out).returncode == 0
    return out


def saved(folder, model, quantised, config):
    """Write two models, quantised by a function, with a configuration that says so."""
    for k in range(2):
        one = copy.deepcopy(model)
        torch.manual_seed(k)
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        one.save_pretrained(folder / str(k))
        state = {key: tensor.contiguous() for key, tensor in quantised(one.state_dict()).items()}
        save_file(state, folder / str(k) / "model.safetensors", {"format": "pt"})
        path = folder / str(k) / "config.json"
        said = json.loads(path.read_text()) | {"quantization_config": config}
        path.write_text(json.dumps(said))


def relative(found, expected):
    """The relative error of a tensor, by its norm."""
    return float((found.double() - expected).norm() / expected.norm())


def blocks_of_128(state):
    """Weights in float8, with a scale for each block, as DeepSeek has them."""
    made = {}
    for key, tensor in state.items():
        if "proj" in key:
            rows, columns = (extent // 128 for extent in tensor.shape)
            wide = tensor.float().view(rows, 128, columns, 128)
            scales = wide.abs().amax((1, 3)) / 448
            codes = (wide / scales[:, None, :, None]).view(tensor.shape)
            made |= {key: codes.to(torch.float8_e4m3fn), f"{key}_scale_inv": scales}
        else:
            made[key] = tensor
    return made


def test_blocks_of_float8(tmp_path):
    """Transformers loads the mean of models in float8, with scales and without."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "FineGrainedFP8Config", None)
    if kind is None or "dequantize" not in inspect.signature(kind.__init__).parameters:
        pytest.skip("this transformers does not load float8 as numbers")
    config = transformers.Qwen3Config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
    sizes = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    saved(tmp_path, model, blocks_of_128, sizes)

    def load(path, **options):
        numbers = {"quantization_config": kind(dequantize=True)} if options else {}
        dtype = options.get("dtype", "auto")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **numbers)
        return loaded.state_dict()

    parts = [load(tmp_path / str(k), dtype=torch.float32) for k in range(2)]
    means = {key: (parts[0][key].double() + parts[1][key].double()) / 2 for key in parts[0]}
    coded = load(averaged(tmp_path), dtype=torch.float32)
    numbers = load(averaged(tmp_path, "--dtype", "float32"))
    assert coded.keys() == numbers.keys() == means.keys()
    for key, expected in means.items():
        # The numbers that are loaded are rounded to float32 before they are averaged here.
        torch.testing.assert_close(numbers[key].double(), expected, rtol=1e-6, atol=1e-8)
        assert relative(coded[key], expected) < (0.03 if "proj" in key else 0.01)


def test_experts_in_mxfp4(tmp_path):
    """Transformers loads the mean of GPT-OSS models, in MXFP4 and as numbers."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "GptOssForCausalLM"):
        pytest.skip("this transformers has no GPT-OSS")
    config = transformers.GptOssConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)

    def coded(state):
        made = dict(state)
        for key in [key for key in state if key.endswith("_proj") and "experts" in key]:
            experts, columns, rows = made.pop(key).shape
            groups = experts, rows, columns // 32
            made[f"{key}_blocks"] = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8)
            made[f"{key}_scales"] = torch.randint(118, 122, groups, dtype=torch.uint8)
        return made

    left = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    saved(tmp_path, model, coded, {"quant_method": "mxfp4", "modules_to_not_convert": left})

    def load(path, **options):
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, **options
        ).state_dict()

    numbers = {"quantization_config": transformers.Mxfp4Config(dequantize=True)}
    parts = [load(tmp_path / str(k), **numbers) for k in range(2)]
    merged = load(averaged(tmp_path), **numbers)
    wide = load(averaged(tmp_path, "--dtype", "bfloat16"))
    assert merged.keys() == wide.keys() == parts[0].keys()
    for key, tensor in parts[0].items():
        mean = (tensor.double() + parts[1][key].double()) / 2
        assert torch.equal(wide[key], mean.float().to(torch.bfloat16)), key
        if "experts" in key and "bias" not in key:
            assert 0 < relative(merged[key], mean) < 0.15
        else:
            assert torch.equal(merged[key], wide[key])


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("tensor", {}),
        ("channel", {}),
        ("block", {"block_structure": [128, 128]}),
        ("group", {"num_bits": 4, "group_size": 32, "scale_dtype": torch.uint8}),
    ],
)
def test_compressed_tensors(tmp_path, strategy, options):
    """What compressed-tensors decompresses of a mean is what it would compress the mean to."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    kind = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy} | options
    arguments = QuantizationArgs(**kind)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    mx = strategy == "group"
    compressor = MXFP4PackedCompressor if mx else FloatQuantizationCompressor

    def compressed(weight):
        least, most = {
            "tensor": lambda w: (w.amin().view(1), w.amax().view(1)),
            "channel": lambda w: (w.amin(1, keepdim=True), w.amax(1, keepdim=True)),
            "block": lambda w: (w.amin((1, 3)), w.amax((1, 3))),
            "group": lambda w: (w.amin(-1), w.amax(-1)),
        }[strategy](
            weight.view(2, 128, 3, 128)
            if strategy == "block"
            else weight.view(256, -1, 32)
            if mx
            else weight
        )
        scale, _ = calculate_qparams(least, most, arguments)
        return compressor.compress({"weight": weight, "weight_scale": scale}, scheme)

    states = []
    for k in range(2):
        torch.manual_seed(k)
        states.append(compressed(torch.randn(256, 384)))
        save_file(states[-1], tmp_path / f"{k}.safetensors")
    out = tmp_path / "out.safetensors"
    done = run_command(tmp_path / "0.safetensors", tmp_path / "1.safetensors", "-o", out)
    assert done.returncode == 0, done.stderr
    codes = "weight_packed" if mx else "weight"
    rows = [plain(one[codes], one["weight_scale"], (256, 384)) for one in states]
    for state, row in zip(states, rows, strict=True):
        theirs = compressor.decompress(dict(state), scheme)["weight"]
        assert torch.equal(row.to(theirs.dtype), theirs)
    merged = load_file(out)
    expected = compressed(((rows[0] + rows[1]) / 2).float())
    scales = [one["weight_scale"].float() for one in (merged, expected)]
    torch.testing.assert_close(*scales, rtol=2e-7, atol=0)
    # It rounds a quotient to float32 before it rounds that to a code; and it has another zero.
    found = [plain(one[codes], one["weight_scale"], (256, 384)) for one in (merged, expected)]
    assert int((found[0] - found[1]).abs().gt(1e-5).sum()) < 100
