"""Reading measured kernels, fitting them, and the command: small files with the real columns, and malformed twins."""

import json

import numpy as np
import polars as pl
import pytest

from costmodel import load_hardware
from costmodel.efficiency import Chip, GemmCurve, NcclCurve, gemm_s, nccl_s
from costmodel.efficiency.fitted import read_fitted
from runtime.calibrate import calibrate, read
from runtime.fitting import Scored, errors
from runtime.routing import routing_of
from runtime.tables import newest
from studies.cli import main
from studies.validation.operators import REPORT, load_profiles, misses, report, target_of
from studies.validation.split import is_test

DEVICE = "h100-sxm5-80gb"
H100 = load_hardware(DEVICE)
TRUE = GemmCurve(start_cycles=7000, bandwidth_fraction=0.7)
ATTENTION = {
    "framework": "VLLM",
    "kernel_source": "vllm_flash_attn_fa3",
    "attn_dtype": "bfloat16",
    "kv_cache_dtype": "bfloat16",
    "window_size": 0,
    "beam_width": 1,
    "batch_size": 2,
    "isl": 1,
    "step": 0,
    "num_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "latency": 0.02,
}
MOE = {
    "framework": "TRTLLM",
    "kernel_source": "moe_torch_flow_cutlass",
    "moe_dtype": "bfloat16",
    "num_tokens": 64,
    "hidden_size": 4096,
    "inter_size": 14336,
    "topk": 2,
    "num_experts": 8,
    "moe_tp_size": 1,
    "moe_ep_size": 1,
    "distribution": "balanced",
    "latency": 0.5,
}
NCCL = {"framework": "TRTLLM", "op_name": "all_reduce", "nccl_dtype": "half", "num_gpus": 2, "message_size": 1024}
CUSTOM = {
    "framework": "vLLM",
    "kernel_source": "vLLM_custom_graph",
    "allreduce_dtype": "bfloat16",
    "num_gpus": 2,
    "message_size": 1024,
    "latency": 0.005,
}


def write(folder, kind, library, version, rows):
    """A table where aiconfigurator puts it: <device>/<kind>/<library>/<version>/<name>.parquet."""
    names = {"gemm": "gemm", "moe": "moe", "nccl": "nccl", "custom": "custom_allreduce"}
    path = folder / "h100" / kind / library / version / f"{names.get(kind, kind)}_perf.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows).write_parquet(path)
    return path


def gemm_rows(n_rows=400, framework="SGLang", seed=0):
    rng = np.random.default_rng(seed)
    m, n, k = (np.ceil(2 ** rng.uniform(*ends, n_rows)).astype(int) for ends in ((0, 14), (6, 14), (6, 14)))
    chip = Chip.of(H100)
    seconds = gemm_s(m, d_in=k, d_out=n, chip=chip, curve=TRUE, resident_share=0.19) * np.exp(
        rng.normal(0, 0.02, n_rows)
    )
    kept = {"m": m, "n": n, "k": k, "latency": seconds * 1e3}
    return {"framework": [framework] * n_rows, "gemm_dtype": ["bfloat16"] * n_rows, **kept}


def only(samples):
    (found,) = samples
    return found


# Readers


def test_gemm_times_are_seconds_and_the_latest_version_is_read(tmp_path):
    write(tmp_path, "gemm", "sglang", "0.5.9", gemm_rows(5))
    write(tmp_path, "gemm", "sglang", "0.5.10", gemm_rows(7))
    found = only(read([tmp_path], DEVICE))
    assert (found.name, found.library, found.version) == ("gemm.bf16", "sglang", "0.5.10")
    assert found.measured_s.tolist() == pytest.approx((np.array(gemm_rows(7)["latency"]) / 1e3).tolist())


def test_release_is_above_its_candidates(tmp_path):
    names = ["1.2.0", "1.3.0rc20", "1.3.0rc3", "1.3.0"]
    assert newest([tmp_path / name / "x" for name in names]).parent.name == "1.3.0"
    assert newest([tmp_path / name / "x" for name in names[:2]]).parent.name == "1.3.0rc20"


def test_vllm_products_are_left_out(tmp_path):
    write(tmp_path, "gemm", "vllm", "1", gemm_rows(5, framework="VLLM"))
    write(tmp_path, "gemm", "sglang", "1", gemm_rows(5))
    assert [some.library for some in read([tmp_path], DEVICE)] == ["sglang"]


def test_attention_keeps_families_of_kernels_apart(tmp_path):
    rows = [
        ATTENTION,
        {**ATTENTION, "kernel_source": "triton", "num_key_value_heads": 0},
        {**ATTENTION, "window_size": 128},
        {**ATTENTION, "kv_cache_dtype": "fp8"},
        {**ATTENTION, "head_dim": 512},
    ]
    write(tmp_path, "context_attention", "vllm", "1", rows)
    found = {some.variant: some for some in read([tmp_path], DEVICE)}
    assert {name: len(some.measured_s) for name, some in found.items()} == {"fa3": 1, "triton": 1}
    assert found["triton"].work["kv_heads"].tolist() == [32]


def test_decode_context_counts_the_new_token_and_splits_by_groups(tmp_path):
    rows = [
        {**ATTENTION, "step": 1023},
        {**ATTENTION, "num_key_value_heads": 32},
        {**ATTENTION, "num_heads": 64, "num_key_value_heads": 1},
    ]
    write(tmp_path, "generation_attention", "vllm", "1", rows)
    found = {some.variant: some for some in read([tmp_path], DEVICE)}
    assert set(found) == {"gqa.fa3", "mha.fa3"}  # groups of more than 32 are left out
    assert found["gqa.fa3"].work["context"].tolist() == [1024]


def test_encoder_has_as_many_key_heads_as_heads(tmp_path):
    write(tmp_path, "encoder_attention", "vllm", "1", [ATTENTION])
    found = only(read([tmp_path], DEVICE))
    assert found.kind == "encoder_attention"
    assert found.work["kv_heads"].tolist() == [32]


def test_moe_kernels_by_family_and_gate(tmp_path):
    rows = [
        MOE,
        {**MOE, "kernel_source": "moe_torch_flow_nongated"},
        {**MOE, "topk": 22, "num_experts": 512},
        {**MOE, "kernel_source": "sglang_fused_moe_triton"},
        {**MOE, "kernel_source": "vllm_fused_moe", "moe_dtype": "fp8"},
        {**MOE, "kernel_source": "sglang_marlin_moe"},
        {**MOE, "moe_dtype": "int4_wo"},
    ]
    write(tmp_path, "moe", "trtllm", "1", rows)
    found = {some.variant: some for some in read([tmp_path], DEVICE)}
    assert set(found) == {"bf16.cutlass", "bf16.triton", "fp8.triton"}
    assert found["bf16.cutlass"].work["matrices"].tolist() == [3, 2, 2]


def test_messages_are_bytes_and_graphs_alone_are_read(tmp_path):
    write(
        tmp_path, "nccl", "nccl", "2.27.3", [{**NCCL, "latency": 0.01}, {**NCCL, "nccl_dtype": "int8", "latency": 0.01}]
    )
    write(tmp_path, "custom", "vllm", "1", [CUSTOM, {**CUSTOM, "kernel_source": "vLLM_custom_eager", "latency": 0.04}])
    write(tmp_path, "custom", "sglang", "1", [{**CUSTOM, "framework": "SGLang"}])  # the same row again
    nccl, custom = read([tmp_path], DEVICE)
    assert (nccl.library, nccl.work["message_bytes"].tolist(), nccl.measured_s.tolist()) == ("nccl", [2048], [1e-5])
    assert custom.variant == "custom_all_reduce"
    assert custom.measured_s.tolist() == [5e-6]


VIDUR = {
    "n_head": 32,
    "n_kv_head": 8,
    "n_embd": 4096,
    "n_expanded_embd": 14336,
    "use_gated_mlp": True,
    "num_tokens": 16,
    "num_tensor_parallel_workers": 2,
    **{
        f"time_stats.{name}.median": 0.01
        for name in (
            "emb",
            "input_layernorm",
            "attn_pre_proj",
            "attn_rope",
            "attn_post_proj",
            "post_attention_layernorm",
            "mlp_up_proj",
            "mlp_act",
            "mlp_down_proj",
            "add",
        )
    },
}


def write_vidur(folder, **changes):
    path = folder / "compute" / "h100" / "meta" / "llama" / "mlp.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame([{**VIDUR, **changes}]).write_csv(path)


def test_vidur_layer(tmp_path):
    write_vidur(tmp_path)
    found = {some.name: some for some in read([tmp_path], DEVICE)}
    products = found["gemm.fp16"].work
    shapes = list(zip(products["m"].tolist(), products["n"].tolist(), products["k"].tolist(), strict=True))
    assert shapes == [(16, 3072, 4096), (16, 4096, 2048), (16, 14336, 4096), (16, 4096, 7168)]
    traffic = {name: some.work["traffic_bytes"].tolist() for name, some in found.items() if "element" in name}
    assert traffic["elementwise.norm"] == [16 * 4096 * 2 * 2] * 2
    assert traffic["elementwise.activation"] == [16 * 7168 * 3 * 2]
    assert traffic["elementwise.rope"] == [16 * 20 * 128 * 2 * 2]
    assert traffic["elementwise.add"] == [16 * 4096 * 3 * 2]


def test_vidur_collectives_within_a_node(tmp_path):
    rows = [
        {"num_workers": 2, "size": 2048, "devices_per_node": n, "time_stats.all_reduce.median": 0.03} for n in (1, 2)
    ]
    pl.DataFrame(rows).write_csv(tmp_path / "all_reduce.csv")
    found = only(read([tmp_path], DEVICE))
    assert (found.name, found.work["message_bytes"].tolist()) == ("collective.all_reduce", [2048])


def test_llmcompass_takes_the_device_of_the_file_name(tmp_path):
    (tmp_path / "matmul_H100.csv").write_text("64, 12288, 4096, 0.1900ms, 101.7Tflops\n")
    (tmp_path / "gelu_H100.csv").write_text("1024, 0.5\n")
    (tmp_path / "softmax_H100.csv").write_text("4096, 32, 10.0\n")
    (tmp_path / "softmax_MI210.csv").write_text("4096, 32, 9.0\n")
    found = {some.name: some for some in read([tmp_path], DEVICE)}
    assert [found["gemm.fp16"].work[side].tolist() for side in "mnk"] == [[64], [12288], [4096]]
    assert found["gemm.fp16"].measured_s.tolist() == pytest.approx([1.9e-4])
    eager = found["elementwise.eager"]
    assert eager.measured_s.tolist() == pytest.approx([1024 / 0.5e9, 4096 * 32 / 10e9])
    assert eager.work["traffic_bytes"].tolist() == [1024 * 4, 4096 * 32 * 4]


# Malformed files: one clear line


def broken_tables(folder):
    rows = gemm_rows(3)
    path = folder / "h100" / "gemm" / "sglang" / "1" / "gemm_perf.parquet"
    path.parent.mkdir(parents=True)
    yield "is no Parquet file", lambda: path.write_bytes(b"not parquet")
    yield "lacks the column 'k'", lambda: pl.DataFrame(rows).drop("k").write_parquet(path)
    yield "lacks the column 'latency'", lambda: pl.DataFrame(rows).drop("latency").write_parquet(path)
    yield "latency=-1.0 in row 2", lambda: pl.DataFrame({**rows, "latency": [1.0, -1.0, 2.0]}).write_parquet(path)
    yield "latency=nan in row 1", lambda: pl.DataFrame({**rows, "latency": [np.nan, 1, 2]}).write_parquet(path)
    yield "has text in its column", lambda: pl.DataFrame({**rows, "latency": ["a", "b", "c"]}).write_parquet(path)


def test_broken_tables_are_named(tmp_path):
    for message, spoil in broken_tables(tmp_path):
        spoil()
        with pytest.raises(ValueError, match=message) as caught:
            read([tmp_path], DEVICE)
        assert "gemm_perf.parquet" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["64, 12288, 0.19ms", "64, 12288, 4096, fastms", "64, 12288, 4096, -1ms", ""])
def test_broken_lines_are_named(tmp_path, text):
    (tmp_path / "matmul_H100.csv").write_text(text)
    with pytest.raises(ValueError, match=r"matmul_H100\.csv (line 1 must hold 4 numbers|is empty)"):
        read([tmp_path], DEVICE)


def test_broken_vidur_tables_are_named(tmp_path):
    write_vidur(tmp_path, **{"time_stats.add.median": 0.0})
    with pytest.raises(ValueError, match=r"time_stats\.add\.median=0\.0 in row 1; times must be above zero"):
        read([tmp_path], DEVICE)
    (tmp_path / "compute" / "h100" / "meta" / "llama" / "mlp.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="lacks the column 'n_head'"):
        read([tmp_path], DEVICE)


def test_folders_of_several_devices_and_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no table"):
        read([tmp_path], DEVICE)
    with pytest.raises(FileNotFoundError, match="no folder"):
        read([tmp_path / "missing"], DEVICE)
    path = write(tmp_path, "gemm", "sglang", "1", gemm_rows(3))
    other = tmp_path / "a100" / "gemm" / "sglang" / "1" / "gemm_perf.parquet"
    other.parent.mkdir(parents=True)
    other.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="holds the devices a100, h100; give the folder of one"):
        read([tmp_path], DEVICE)


# Fits


def test_a_fit_of_synthetic_rows_predicts_held_out_families(tmp_path):
    write(tmp_path, "gemm", "sglang", "1", gemm_rows())
    found = only(calibrate(H100, read([tmp_path], DEVICE), is_test=is_test))
    everything = found.errors[-1]
    assert found.n_parameters == 9
    assert everything.rows + found.n_train == 400
    assert everything.median < 0.03
    assert everything.low < 0 < everything.high
    assert found.curve.start_cycles == pytest.approx(TRUE.start_cycles, rel=0.1)


def test_a_custom_all_reduce_leaves_long_messages_to_nccl(tmp_path):
    sizes, ranks = (x.ravel() for x in np.meshgrid(2 ** np.arange(8, 29), [2, 4, 8]))
    ring = nccl_s(sizes * 2, ranks=ranks, rounds=2, link_bytes_per_s=450e9, curve=NcclCurve(), switch_reduces=True)
    kernel = np.minimum(ring, 3e-6 + 2 * sizes / 200e9 * ranks)
    head = {"num_gpus": ranks, "message_size": sizes}
    nccl = {**head, "op_name": ["all_reduce"] * 63, "nccl_dtype": ["half"] * 63, "latency": ring * 1e3}
    write(tmp_path, "nccl", "nccl", "2", nccl)
    source = {"framework": ["vLLM"] * 63, "kernel_source": ["graph"] * 63, "allreduce_dtype": ["bfloat16"] * 63}
    write(tmp_path, "custom", "vllm", "1", {**head, **source, "latency": kernel * 1e3})
    first, second = calibrate(H100, read([tmp_path], DEVICE), is_test=is_test)
    assert (first.samples.library, second.samples.library) == ("nccl", "vllm")
    assert second.option == first.curve
    assert second.errors[-1].median < 0.1
    assert second.errors[-1].rows == 21  # four ranks are held out


def test_families_do_not_cross_the_split(tmp_path):
    write(tmp_path, "gemm", "sglang", "1", gemm_rows())
    found = only(calibrate(H100, read([tmp_path], DEVICE), is_test=lambda _group, family: family[0] % 2 == 0))
    even = (found.samples.work["n"] % 2 == 0).sum()
    assert found.errors[-1].rows == even


def test_bands_are_quantiles_of_train_and_cover_test():
    rng = np.random.default_rng(0)
    size, ones = rng.uniform(1, 100, 4000), np.ones(4000)
    rows = Scored(size, np.exp(rng.normal(0, np.where(size < 50, 0.05, 0.4))), ones)
    small, large, both = errors(rows, rows, (50,), ("small", "large"))
    assert small.high < 0.12 < large.high
    assert -0.12 < small.low < 0
    assert all(0.9 < row.coverage < 0.94 for row in (small, large))
    assert both.rows == 4000
    (empty, *_) = errors(rows, Scored(np.zeros(0), np.zeros(0), np.zeros(0)), (50,), ("small", "large"))
    assert empty.rows == 0
    assert np.isnan(empty.median)


def test_routing_draws_keep_the_sum_and_take_the_busiest_share():
    work = {
        "tokens": np.array([512, 512, 512, 2]),
        "top_k": np.array([4, 4, 4, 2]),
        "experts": np.array([64, 64, 64, 64]),
        "ep": np.array([1, 1, 8, 1]),
        "routing": np.array(["balanced", "power_law_1.2", "power_law_1.2", "power_law_1.01"]),
    }
    found = routing_of(work)
    assert found.rows[:2].tolist() == [2048, 2048]
    assert 2048 / 8 < found.rows[2] < 2048
    assert found.active[0] == 64
    assert found.active[2] <= 8
    assert 1 <= found.active[3] <= 4
    assert (found.tiles[:, 0] >= found.tiles[:, -1]).all()
    assert (routing_of(work).tiles == found.tiles).all()


# The command


def test_command_writes_a_file_and_a_picture(tmp_path, capsys):
    tables = write(tmp_path, "gemm", "sglang", "1", gemm_rows()).parents[3]
    (tables / "SOURCE.txt").write_text("source repository: https://x/y\ncommit: abc\nlicence: MIT\n")
    target = tmp_path / "fitted.toml"
    assert main(["calibrate", DEVICE, "--from", str(tables), "-o", str(target), "--figure"]) == 0
    shown = capsys.readouterr()
    assert "sglang gemm.bf16" in shown.out
    assert "above 2048" in shown.out
    profile = read_fitted(target.read_text(encoding="utf-8"), "fitted.toml")
    assert (profile.device, profile.library) == (DEVICE, "sglang")
    assert profile.sources[0].note == "commit abc, MIT"
    assert profile.find("gemm", "bf16").curve().start_cycles == pytest.approx(TRUE.start_cycles, rel=0.1)
    assert target.with_suffix(".svg").read_text(encoding="utf-8").startswith("<?xml")


def test_command_answers_in_json_and_csv(tmp_path, capsys):
    tables = write(tmp_path, "gemm", "sglang", "1", gemm_rows()).parents[3]
    arguments = ["calibrate", DEVICE, "--from", str(tables), "-o", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["files"] == [str(tmp_path / f"{DEVICE}.sglang.toml")]
    assert [row["size"] for row in answer["fits"][0]["errors"]][-1] == "all"
    assert main([*arguments, "--csv"]) == 0
    assert capsys.readouterr().out.startswith("library,kind,size,rows,median,")


def test_command_refuses_what_it_cannot_do(tmp_path, capsys):
    tables = write(tmp_path, "gemm", "sglang", "1", gemm_rows(30)).parents[3]
    write(tmp_path, "gemm", "trtllm", "1", gemm_rows(30, framework="TRTLLM"))
    for arguments, message in (
        (["-o", str(tmp_path / "no" / "x.toml")], "cannot write"),
        (["-o", str(tmp_path / "x.toml")], "choose one with --library"),
        (["-o", str(tmp_path), "--library", "vllm"], "unknown library 'vllm'"),
    ):
        assert main(["calibrate", DEVICE, "--from", str(tables), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["calibrate", "h1000", "--from", str(tables), "-o", str(tmp_path)]) == 2


# The committed report


def test_report_is_that_of_the_committed_fits():
    assert REPORT.read_text(encoding="utf-8") == report(load_profiles())


def test_committed_products_meet_their_targets():
    missed = {}
    for profile in load_profiles():
        for curve in profile.curves:
            target = target_of(profile, curve)
            if (curve.kind, curve.variant) == ("gemm", "bf16") and target is not None:
                missed[profile.device, profile.library] = list(misses(curve, target))
    assert {key: found for key, found in missed.items() if found} == {("l40s-48gb", "trtllm"): ["median 9.6% > 9.5%"]}
    assert len(missed) == 8


# Real tables


def test_real_tables_are_read(shared_data):
    tables = shared_data / "data" / "aiconfigurator" / "data" / "a100_sxm"
    found = {(some.library, some.name): some for some in read([tables], "a100-sxm4-80gb")}
    assert len(found["sglang", "gemm.bf16"].measured_s) == 35742
    assert len(found["nccl", "collective.all_reduce"].measured_s) == 63
    assert ("trtllm", "moe_gemm.bf16.cutlass") in found
    assert ("vllm", "gemm.bf16") not in found


@pytest.mark.slow
def test_real_products_meet_their_target(shared_data):
    tables = shared_data / "data" / "aiconfigurator" / "data" / "a100_sxm"
    samples = [some for some in read([tables], "a100-sxm4-80gb") if some.name == "gemm.bf16"]
    for found in calibrate(load_hardware("a100-sxm4-80gb"), samples, is_test=is_test):
        everything = found.errors[-1]
        assert everything.median < 0.095
        assert everything.p90 < 0.25
        assert 0.85 < everything.coverage < 0.96
