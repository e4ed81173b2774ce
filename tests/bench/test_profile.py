"""``lba-bench steps --profile``: which kernel belongs where, time that is idle, and what a profiler that breaks costs."""

import ast
import csv
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import lba_exp
from lba_exp.bench import profile, steps
from lba_exp.bench.profile import Span, group_of, short
from lba_exp.commands import bench

TINY = ["size=vit_tiny", "model.width=8", "model.depth=1", "model.heads=2", "model.patch_size=4"]
OPTIONS = ["--repeats=1", "--seconds=0.01", "--resolution=12", "--batch=3", "--classes=5", "--compile=off"]
FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 64, 4, cutlass::bfloat16_t>, false, true>(pytorch_flash::P)"
N = "at::native::(anonymous namespace)::"
ADAM = f"void {N}multi_tensor_apply_kernel<{N}FusedOptimizerTensorListMetadata<4>, {N}FusedAdamMathFunctor<float, 4, ({N}MODE)1> >({N}F<4>)"
ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul> >(int, float)"


def run(*arguments, code=0, device="cpu"):
    with pytest.raises(SystemExit) as end:
        bench.main(["steps", *arguments, *TINY, *OPTIONS, f"--device={device}", "--profile", "--output=out"])
    assert end.value.code == code
    return json.loads(Path("out/result.json").read_text())


@pytest.mark.parametrize(
    ("name", "group"),
    [
        (FLASH, "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0", "attention"),
        ("void pytorch_flash::flash_bwd_convert_dq_kernel<Flash_bwd_kernel_traits<64>, false>(P, int)", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("lba_exp::recurrent", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_64x4_nn_align8>(P)", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasLt::P<float>)", "matrix products"),
        ("triton_tem_fused_addmm_3", "matrix products"),
        ("aten::addmm", "matrix products"),
        (ADAM, "optimizer"),
        ("triton_per_fused__scaled_dot_product_flash_attention_backward_add_3", "Inductor"),
        ("triton_poi_fused_mm_gelu_2", "Inductor"),
        (ADD, "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
        ("aten::add_", "other"),
    ],
)
def test_groups(name, group):
    assert group_of(name) == group


def test_every_kernel_of_the_fused_form_is_attention():
    trees = [ast.parse(path.read_text()) for path in (Path(lba_exp.__file__).parent / "ops" / "fused").glob("*.py")]
    names = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")]
    assert len(names) >= 8 and {name: group_of(name) for name in names} == dict.fromkeys(names, "attention")
    assert group_of("scan_kernel_0d1d2de") == "attention" and group_of("my_scan_kernel") == "other"


def test_short_names():
    assert short(FLASH) == "flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 64, 4, bfloat16_t>, false, true>"
    assert short(ADD) == "vectorized_elementwise_kernel<4, CUDAFunctor_add<float>, array<char*, 3ul> >"
    assert short(ADAM).startswith("multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor<float, 4, (")
    assert short("fmha_cutlassF_sm80(A<x>::Params)") == "fmha_cutlassF_sm80"
    for name in ("Memcpy DtoD (Device -> Device)", "aten::addmm", "nvjet_tst_64x8", "autograd::engine::evaluate_function: AddmmBackward0"):
        assert short(name) == name


def event(name, start, end, device=DeviceType.CUDA, annotation=False, kind="kernel"):
    return SimpleNamespace(
        name=name,
        device_type=device,
        is_user_annotation=annotation,
        activity_type=kind,
        time_range=SimpleNamespace(start=start, end=end),
    )


def test_busy_and_idle_time_of_a_gpu():
    """Kernels side by side count once in the busy time; annotations, waits and the host's events count nowhere."""
    events = [
        event("sums_kernel", 100.0, 400.0),
        event(ADD, 300.0, 600.0),  # on another stream
        event("sums_kernel", 900.0, 1000.0),
        event("Memcpy DtoD (Device -> Device)", 920.0, 930.0, kind="gpu_memcpy"),
        event("Optimizer.step#AdamW.step", 0.0, 2000.0, annotation=True, kind="gpu_user_annotation"),
        event("Stream Wait Event", 0.0, 2000.0, kind="cuda_sync"),
        event("cudaLaunchKernel", 0.0, 2000.0, device=DeviceType.CPU, kind="cuda_runtime"),
    ]
    found = profile.summarise(profile.kernels_of(events), 2.0)
    assert found["busy_ms"] == pytest.approx(0.6) and found["idle_ms"] == pytest.approx(1.4)
    groups = {g["group"]: (g["calls"], g["ms"], g["share"]) for g in found["groups"]}
    assert groups["attention"] == (2, pytest.approx(0.4), pytest.approx(0.2)) and groups["other"][:2] == (2, pytest.approx(0.31))
    assert groups["optimizer"] == (0, 0, 0)
    assert [(k["kernel"][:12], k["calls"]) for k in found["kernels"]] == [("sums_kernel", 2), ("vectorized_e", 1), ("Memcpy DtoD ", 1)]


def test_idle_time_is_never_below_zero():
    assert profile.summarise([Span("sums_kernel", "attention", 0.0, 3.0, 3.0)], 2.9)["idle_ms"] == 0


def test_profiles_on_the_cpu(tmp_path, monkeypatch, capsys):
    order, turns, trace, host_time = [], steps.take_turns, profile.trace, profile.host_time
    monkeypatch.setattr(steps, "take_turns", lambda *args: (turns(*args), order.append("turns"))[0])
    monkeypatch.setattr(profile, "trace", lambda *args: (order.append("trace"), trace(*args))[1])
    monkeypatch.setattr(profile, "host_time", lambda *args: (order.append("host"), host_time(*args))[1])
    content = run("softmax", "lion_d")
    assert order == ["turns", "host", "host", *["trace"] * 4], "nothing that is timed comes after the profiler"
    assert [p["model"] for p in content["profiles"]] == ["softmax", "lion_d"] and content["status"] == "finished"
    for p in content["profiles"]:
        assert p["problem"] is None and p["host_ms"] is None and 0 < p["busy_ms"] <= p["step_ms"] == p["profiled_ms"]
        assert p["idle_ms"] == pytest.approx(p["step_ms"] - p["busy_ms"])
        groups = {g["group"]: g for g in p["groups"]}
        for kind in ("groups", "kernels"):  # operators without what they call: together the time in operators, once
            assert sum(x["ms"] for x in p[kind]) == pytest.approx(p["busy_ms"], rel=0.02)
        assert sum(g["calls"] for g in p["groups"]) == sum(k["calls"] for k in p["kernels"])
        owners = {k["name"]: k["group"] for k in p["kernels"] if k["group"] != "other"}
        assert owners["aten::_fused_adamw_"] == owners["Optimizer.step#AdamW.step"] == "optimizer"
        assert owners["aten::addmm"] == "matrix products" and groups["matrix products"]["ms"] > 0
        assert (groups["attention"]["ms"] > 0) == (p["model"] == "softmax")
        assert [k["ms"] for k in p["kernels"]] == sorted((k["ms"] for k in p["kernels"]), reverse=True)
    rows = list(csv.DictReader((tmp_path / "out" / "kernels.csv").open()))
    assert [(r["model"], r["name"], float(r["ms"])) for r in rows] == [
        (p["model"], k["name"], k["ms"]) for p in content["profiles"] for k in p["kernels"]
    ]
    for text in (capsys.readouterr().out, (tmp_path / "out" / "table.md").read_text()):
        words = " ".join(text.split())
        assert "Where the time of a step goes" in words and "softmax: in operators" in words and "lion_d: in operators" in words
        longest = content["profiles"][0]["kernels"]
        assert longest[14]["name"] in words and f"{len(longest) - 15} more" in words and "profile: one more step" in words


def test_a_profiler_that_breaks_costs_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.profiler, "supported_activities", lambda: [])
    content = run("softmax", "lion_d")
    assert {c["status"] for c in content["cells"]} == {"measured"} and content["status"] == "finished"
    sentence = "softmax has no profile: RuntimeError: torch's profiler cannot follow the GPU here (CUPTI is missing)"
    for text in (capsys.readouterr().out, (tmp_path / "out" / "table.md").read_text()):
        assert text.count(sentence) == 1 and text.count("has no profile") == 2 and "Where the time" not in text
    assert (tmp_path / "out" / "kernels.csv").read_text() == "model,group,kernel,calls,ms,share,name\n"


def test_a_profiler_that_sees_nothing_says_so(monkeypatch):
    monkeypatch.setattr(profile, "operators_of", lambda events: [])
    (found,) = profile.profiles({"softmax": lambda: None}, {"softmax": 1.0}, torch.device("cpu"), lambda text, done: None)
    assert "saw nothing run" in found["problem"] and set(found) == {"model", "problem"}


def test_stopped_while_profiling(tmp_path, monkeypatch, capsys):
    def killed(step, median_ms, device):
        content = json.loads((tmp_path / "out" / "result.json").read_text())
        assert content["cells"][0]["status"] == "measured" and (tmp_path / "out" / "table.md").exists(), "what a killed process leaves"
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(profile, "profile", killed)
    content = run("softmax", code=143)
    assert content["status"] == "interrupted" and content["cells"][0]["median_ms"] > 0 and content["profiles"] == []
    assert "stopped by SIGTERM after 0 of 1 profiles" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu():
    content = run("softmax", "lion_s model.mixer.form=fused", "model.width=64", device="cuda")
    for p in content["profiles"]:
        groups = {g["group"]: g for g in p["groups"]}
        assert p["problem"] is None and 0 < p["busy_ms"] < p["profiled_ms"] and 0 < p["host_ms"] < 10 * p["step_ms"]
        assert all(groups[name]["ms"] > 0 for name in ("attention", "matrix products", "optimizer"))
        assert not any("Optimizer.step" in k["name"] for k in p["kernels"])
