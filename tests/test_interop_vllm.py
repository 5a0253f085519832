"""The plug-in for vLLM: our layer's engine over its layer, with every kind of batch.

Where vLLM is installed (scripts/test_vllm) with its own layer, plug-in registry and metadata builder, elsewhere with a
small stand-in for them.
"""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes import vllm_stand_in as stand_in
from gated_delta.batch import GatedDeltaNetBatch, Row
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.errors import ArgumentError
from gated_delta.interop import vllm as plugin
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.state import LayerState
from layer_helpers import Engine, Move, make_layer

REAL = find_spec("vllm") is not None
pytestmark = pytest.mark.filterwarnings("default" if REAL else "error")
PREFIX, BLOCK = "model.layers.0.linear_attn", 128
SHAPE = GatedDeltaNetConfig(hidden_size=64, num_k_heads=2, num_v_heads=4, head_k_dim=32, head_v_dim=64)
SHAPES = {"interleaved": SHAPE, "flat": replace(SHAPE, projection="flat", num_v_heads=2, output_gate="sigmoid")}


@pytest.fixture(scope="module")
def engine_module() -> Iterator[Any]:
    """The module of the engine's layer, imported after the plug-in was loaded, as the engine does it."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        library = None
        if REAL:
            patch.setenv("VLLM_CACHE_ROOT", folder)
            _on_cpu(Path(folder))
        else:
            stand_in.install(patch)
            library = torch.library.Library("vllm", "FRAGMENT")
            name = "qwen_gdn_attention_core_fused_norm_packed"
            library.define(f"{name}(Tensor qkvz, Tensor ba, Tensor(a!) out, str layer_name) -> ()")
            library.impl(name, stand_in.operator, "CPU")
        plugin.register()
        plugin.register()  # an engine may load it twice
        assert plugin.MODULE not in sys.modules
        yield importlib.import_module(plugin.MODULE)
        del library


# --- one layer of the engine ------------------------------------------------------------------------------------------


def _on_cpu(folder: Path) -> None:
    """The engine on CPUs, also where its build is for GPUs, with one rank."""
    platforms: Any = importlib.import_module("vllm.platforms")
    platforms._current_platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform()
    distributed = importlib.import_module("vllm.distributed")
    config = importlib.import_module("vllm.config")
    with config.set_current_vllm_config(config.VllmConfig()):
        distributed.init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        distributed.initialize_model_parallel(1, 1)


def _engine_config(model: Any, num_spec: int, aligned: bool) -> Any:
    if not REAL:
        mode = SimpleNamespace(mamba_cache_mode="align" if aligned else "none")
        limits = SimpleNamespace(max_num_seqs=2)
        return SimpleNamespace(cache_config=mode, num_speculative_tokens=num_spec, scheduler_config=limits)
    options: dict[str, Any] = {"enable_prefix_caching": aligned, "mamba_cache_mode": "align" if aligned else "none"}
    if num_spec:
        options["speculative_config"] = {"method": "ngram", "num_speculative_tokens": num_spec, "prompt_lookup_max": 2}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(vars(model)))
        config = importlib.import_module("vllm.engine.arg_utils").EngineArgs(
            model=folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=1024,
            max_num_seqs=8, max_num_batched_tokens=1024, **options,
        ).create_engine_config()  # fmt: skip
    caches = config.cache_config
    caches.block_size = caches.mamba_block_size = caches.hash_block_size = caches.cache_hit_alignment_tokens = BLOCK
    return config


class Served:
    """Stands where :class:`Engine` has our layer: takes our batches to the engine's layer, by the engine's metadata."""

    def __init__(self, module: Any, ours: GatedDeltaNetAttention, num_spec: int = 0, aligned: bool = False) -> None:
        c = ours.config
        model = SimpleNamespace(
            architectures=["Qwen3_5ForCausalLM"], model_type="qwen3_5_text", hidden_size=c.hidden_size, vocab_size=64,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32, intermediate_size=64,
            layer_types=["linear_attention", "full_attention"], linear_num_key_heads=c.num_k_heads, hidden_act="silu",
            linear_num_value_heads=c.num_v_heads, linear_key_head_dim=c.head_k_dim, max_position_embeddings=1024,
            linear_value_head_dim=c.head_v_dim, linear_conv_kernel_dim=c.conv_width, rms_norm_eps=c.norm_eps,
            output_gate_type=c.output_gate,
        )  # fmt: skip
        self.config, self.num_spec = _engine_config(model, num_spec, aligned), num_spec
        self.keep: dict[int, tuple[int, int]] = {}
        """Slot of a prefill: the slot of a checkpoint, and after how many tokens."""
        options = {"prefix": PREFIX, "gqa_interleaved_layout": c.projection == "interleaved"}
        made = getattr(module, plugin.LAYER)
        if REAL:
            hf = self.config.model_config.hf_text_config
            hf.output_gate_type = c.output_gate
            with importlib.import_module("vllm.config").set_current_vllm_config(self.config):
                self.layer = made(hf, self.config, **options)
        else:
            self.layer = made(model, self.config, **options)
            stand_in.CONTEXT.layers[PREFIX] = self.layer
        self.layer.requires_grad_(False)
        for name, weight in self.layer.named_parameters():
            weight.copy_(joined(ours, name))
        for module_ in self.layer.modules() if REAL else ():
            if (method := getattr(module_, "quant_method", None)) is not None:
                method.process_weights_after_loading(module_)
        self.spec: Any = self.layer.get_kv_cache_spec(self.config) if REAL else None

    def bind(self, slots: int) -> LayerState:
        """States in pages that are a little longer than they need to be, full of NaN."""
        size = 4 * sum(torch.Size(shape).numel() for shape in (self.spec or self.layer).shapes) + 256
        self.layer.bind_kv_cache(torch.empty(slots * size, dtype=torch.int8).view(slots, 1, 1, size))
        state = self.layer._state
        for states in state[:2]:
            states.fill_(torch.nan)
        return state

    def __call__(self, hidden: Tensor, batch: GatedDeltaNetBatch, state: LayerState) -> Tensor:
        metadata = (built if REAL else described)(self, batch)
        with torch.inference_mode(), self.context({PREFIX: metadata}):
            return self.layer(hidden)

    def context(self, metadata: Any) -> Any:
        if REAL:
            return importlib.import_module("vllm.forward_context").set_forward_context(metadata, self.config)
        stand_in.CONTEXT.attn_metadata = metadata
        return nullcontext()


def joined(ours: GatedDeltaNetAttention, name: str) -> Tensor:
    """The engine's weight of that name, of ours."""
    split = {"in_proj_qkvz.weight": ("in_proj_qkv", "in_proj_z"), "in_proj_ba.weight": ("in_proj_b", "in_proj_a")}
    if ours.config.projection == "flat" and name in split:
        return torch.cat([ours.get_parameter(f"{part}.weight") for part in split[name]])
    return torch.zeros(1) if name == "conv1d.bias" else ours.get_parameter(name)


def nulled(x: Tensor | None) -> Tensor | None:
    """Padding by the engine's slot for it."""
    return None if x is None else x.where(x >= 0, 0)


def described(served: Served, b: GatedDeltaNetBatch) -> SimpleNamespace:
    """Metadata by the engine's names. As in its batches for graphs, indices reach behind the rows."""
    slots = nulled(b.non_spec_state_indices)
    checkpoint = None
    if slots is not None and served.keep:
        kept = [served.keep.get(slot, (0, 0)) for slot in slots.tolist()]
        checkpoint = SimpleNamespace(
            offsets=[n for _, n in kept], state_indices=torch.tensor([slot for slot, _ in kept])
        )
    return SimpleNamespace(
        **{name: value for name, value in vars(b).items() if name.startswith("num_")}, checkpoint=checkpoint,
        has_initial_state=b.has_initial_state, non_spec_query_start_loc=b.non_spec_query_start_loc,
        non_spec_state_indices_tensor=None if slots is None else torch.cat((slots, slots.new_zeros(2))),
        spec_query_start_loc=b.spec_query_start_loc, spec_state_indices_tensor=nulled(b.spec_state_indices),
        spec_token_indx=b.spec_token_index, non_spec_token_indx=b.non_spec_token_index,
    )  # fmt: skip


def built(served: Served, b: GatedDeltaNetBatch) -> Any:
    """Metadata that the engine's own builder makes of the same rows, as its scheduler would describe them."""
    rows: list[tuple[int, int, list[int], int, bool]] = []  # first token, tokens, slots, accepted or 0, has history
    for spec, starts, index in (
        (True, b.spec_query_start_loc, b.spec_token_index),
        (False, b.non_spec_query_start_loc, b.non_spec_token_index),
    ):
        for i, count in enumerate([] if starts is None else starts.diff().tolist()):
            first = int(starts[i]) if index is None else int(index[starts[i]])  # type: ignore[index]
            slots = nulled(b.spec_state_indices if spec else b.non_spec_state_indices)[i]  # type: ignore[index]
            accepted = int(b.num_accepted_tokens[i]) if spec else 0  # type: ignore[index]
            known = spec or bool(b.has_initial_state[i])  # type: ignore[index]
            rows.append((first, count, slots.reshape(-1).tolist(), accepted, known))
    rows.sort()
    count = torch.tensor([row[1] for row in rows], dtype=torch.int32)
    lengths = torch.tensor([row[1] + 10 * row[4] for row in rows], dtype=torch.int32)
    table = torch.zeros(len(rows), 8, dtype=torch.int32)
    for row, (length, (_, _, slots, _, _)) in enumerate(zip(lengths.tolist(), rows, strict=True)):
        first = (length - 1) // BLOCK if served.spec.mamba_cache_mode == "align" else 0
        table[row, first : first + len(slots)] = torch.tensor(slots)
        if slots[0] in served.keep:
            table[row, first - 1] = served.keep[slots[0]][0]
    starts = torch.cat((count.new_zeros(1), count.cumsum(0))).int()
    common = importlib.import_module("vllm.v1.attention.backend").CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths, num_reqs=len(rows),
        num_actual_tokens=b.num_actual_tokens, max_query_len=int(count.max()), max_seq_len=1024,
        block_table_tensor=table, slot_mapping=torch.zeros(b.num_actual_tokens, dtype=torch.int64),
        is_prefilling=torch.tensor([not row[3] and (row[1] > 1 or not row[4]) for row in rows]),
        seq_lens_cpu_upper_bound=lengths,
    )  # fmt: skip
    backend = importlib.import_module("vllm.v1.attention.backends.gdn_attn")
    builder = backend.GDNAttentionMetadataBuilder(served.spec, [PREFIX], served.config, torch.device("cpu"))
    accepted = torch.tensor([row[3] or 1 for row in rows], dtype=torch.int32)
    drafts = torch.tensor([row[1] - 1 if row[3] else -1 for row in rows], dtype=torch.int32)
    return builder.build(0, common, accepted, drafts) if served.num_spec else builder.build(0, common)


def engine(module: Any, projection: str, num_spec: int = 0, aligned: bool = False) -> tuple[Engine, Served]:
    layer = make_layer(SHAPES[projection])
    run, served = Engine(layer, num_spec=num_spec, reserve_null=True), Served(module, layer, num_spec, aligned)
    run._served, run.state = served, served.bind(24)  # type: ignore[assignment]
    return run, served


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["SD", "DS"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if REAL:
        used = importlib.import_module("vllm.model_executor.layers.mamba.mamba_utils")
        monkeypatch.setattr(used, "get_conv_state_layout", lambda: request.param)
    monkeypatch.setattr(stand_in.Layer, "layout", request.param)
    return request.param


@pytest.mark.parametrize("projection", SHAPES)
def test_decodes_and_prefills(engine_module: Any, projection: str, layout: str) -> None:
    run, served = engine(engine_module, projection)
    assert isinstance(served.layer, plugin._Served)
    assert run.state.conv.stride()[1:] == ((1, run.state.conv.shape[1]) if layout == "SD" else (3, 1))
    a, b, c, d = (run.add(length) for length in (90, 40, 30, 20))
    plugin.served.clear()
    run.step(Move(a, 70), Move(b, 5))
    run.step(Move(a, 1), Move(b, 1), Move(c, 1))  # the third one has no history
    run.step(Move(a, 1), Move(b, 1), Move(c, 1), idle=2, padding=3)
    run.step(Move(a, 1), Move(b, 30), Move(d, 20), padding=1)
    run.step(Move(c, 1), Move(a, 1))
    run.assert_right()
    assert +plugin.served == {"calls": 5, "prefill": 5, "decode": 10}


@pytest.mark.parametrize("projection", SHAPES)
def test_speculation(engine_module: Any, projection: str, layout: str) -> None:
    run, _ = engine(engine_module, projection, num_spec=3)
    a, b, c = (run.add(length) for length in (90, 60, 40))
    plugin.served.clear()
    run.step(Move(a, 50), Move(b, 3))
    run.step(Move(a, 4, 2), Move(b, 2, 1))
    run.step(Move(a, 1, 1), Move(c, 20), Move(b, 4, 4))  # a prefill between them
    run.step(Move(c, 1), Move(b, 4, 3), Move(a, 3, 3))  # one token among them, which is a prefill
    run.step(Move(a, 4, 4), Move(b, 4, 1), padding=2)
    run.step(Move(c, 1))
    run.assert_right()
    assert +plugin.served == {"calls": 6, "prefill": 4, "speculative": 8, "decode": 1}


@pytest.mark.parametrize("projection", SHAPES)
def test_checkpoints_inside_prefills(engine_module: Any, projection: str, layout: str) -> None:
    """What is kept for other requests is what a prefill of that prefix leaves; these go on from there."""
    run, served = engine(engine_module, projection, aligned=True)
    a, b, c, prefix = run.add(40), run.add(200, seed=7), run.add(60), run.add(200, seed=7)
    run.step(Move(a, 20), Move(prefix, BLOCK))
    kept = run.pool.allocate()[0]
    served.keep = {b.slots[0]: (kept, BLOCK)}
    plugin.served.clear()
    run.step(Move(a, 1), Move(b, 190), Move(c, 30))
    assert +plugin.served == {"calls": 1, "decode": 1, "prefill": 3, "checkpoint": 1}
    for states in run.state[:2]:
        assert torch.equal(states[kept], states[prefix.slots[0]])
    served.keep = {}
    prefix.slots = [kept]
    run.step(Move(a, 1), Move(b, 1), Move(prefix, 1), Move(c, 30))
    run.assert_right()


def test_gates_of_all_ranks(engine_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for some quantised weights do not cut them; the layer picks those of its rank."""
    run, served = engine(engine_module, "flat")
    whole, heads = served.layer.in_proj_ba, SHAPES["flat"].num_v_heads
    given = whole.forward
    monkeypatch.setattr(whole, "forward", lambda x: (given(x)[0].repeat_interleave(2, dim=1), None))
    monkeypatch.setattr(served.layer, "split_ba", lambda ba: (ba[:, : 2 * heads : 2], ba[:, 2 * heads :: 2]))
    a = run.add(90)
    run.step(Move(a, 80))
    run.step(Move(a, 1))
    run.assert_right()


def test_a_profile_run(engine_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no metadata. Kernels compile then, on states that lie as they will, for GPUs."""
    run, served = engine(engine_module, "flat", num_spec=2)
    before = served.layer.kv_cache
    plugin.served.clear()
    with torch.inference_mode(), served.context(None):
        assert not served.layer(torch.randn(5, 64)).any()
    assert plugin.served == {"profile": 1}
    warmed: list[Any] = []

    def warmup(layer: GatedDeltaNetAttention, state: LayerState, *, max_batch: int) -> None:
        warmed.append((state.conv.stride(), max_batch))
        layer(torch.ones(3, 1), GatedDeltaNetBatch.build([Row(1, -1), Row(2, -1, fresh=True)]), state)

    monkeypatch.setattr(GatedDeltaNetAttention, "warmup", warmup)
    if not REAL:
        size = 4 * sum(torch.Size(shape).numel() for shape in served.layer.shapes)
        monkeypatch.setattr(
            stand_in.Layer, "get_kv_cache_spec", lambda *_: SimpleNamespace(page_size_bytes=size), raising=False
        )
    with torch.inference_mode():
        served.layer._warm_up(torch.ones(1))
    assert warmed == [
        (((run.state.conv.stride(0) - 64), *run.state.conv.stride()[1:]), served.config.scheduler_config.max_num_seqs)
    ]
    assert served.layer.kv_cache is before


def test_nothing_of_the_engine_runs_a_part(engine_module: Any) -> None:
    _, served = engine(engine_module, "flat")
    for name in ("_forward_core", "_forward_core_rocm", "_forward_core_fused_norm"):
        with pytest.raises(NotImplementedError, match="as a whole"):
            getattr(served.layer, name)(1, b=2)


def test_a_head_size_that_we_do_not_serve(engine_module: Any) -> None:
    layer = make_layer(SHAPES["flat"])
    object.__setattr__(layer.config, "head_k_dim", 16)
    try:
        with pytest.raises(ArgumentError, match="head_k_dim is 16; it must be one of 32"):
            Served(engine_module, layer)
    finally:
        object.__setattr__(layer.config, "head_k_dim", 32)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0rc1", "1.0.0", "dev"])
def test_an_unknown_version_is_left_alone(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    before = [*sys.meta_path]
    with pytest.warns(UserWarning, match=f"leaves vLLM {version} as it is: it was tested with 0.32 to 0.33"):
        plugin.register()
    assert sys.meta_path == before


def test_another_plugin_was_first(engine_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module("vllm.model_executor.custom_op").op_registry_oot
    monkeypatch.setitem(registry, plugin.LAYER, dict)
    with pytest.warns(UserWarning, match="<class 'dict'> already stands in for Qwen"):
        plugin.register()
    assert registry[plugin.LAYER] is dict


def test_a_line_in_the_log(
    engine_module: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = importlib.import_module("vllm.model_executor.custom_op").op_registry_oot
    monkeypatch.delitem(registry, plugin.LAYER)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO, "vllm.gated_delta"):
        plugin.register()
    root = Path(__file__).parents[1]
    page = (root / "docs" / "integrate" / "vllm.md").read_text()
    (said,) = {message for message in caplog.messages if "gated_delta" in message}
    assert said.rpartition(" ")[0] in page
    assert " to ".join(plugin.TESTED) in page
    assert 'gated_delta = "gated_delta.interop.vllm:register"' in (root / "pyproject.toml").read_text()


def test_importing_loads_no_engine() -> None:
    program = "import sys, gated_delta.interop.vllm; print({'vllm', 'transformers', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "set()\n"
