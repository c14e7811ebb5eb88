"""A plan says what the run itself would need, and counts operations as they are."""

import contextlib
import json
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from advice import follows
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec, use_abstract_mesh

from finetune import cli
from finetune.planning import plan as planning
from finetune.planning import slices
from finetune.planning.flops import model_flops, program_flops
from finetune.planning.slices import Compiled
from finetune.weights import load_for_training
from mtp_model import ModelConfig, load, make_mesh
from mtp_model.checkpoint.directory import open_checkpoint
from mtp_model.dispatch import FEWEST_SLOTS, FIRST_ROUND, LATER_ROUNDS
from mtp_model.meshes import VMEM_LIMIT, compiler_options

GB = 10**9
LEVEL = "optimization_level"
SIZES = ("argument", "output", "alias", "temp")
MEMORY = SimpleNamespace(**{f"{name}_size_in_bytes": n for n, name in enumerate(SIZES, start=2)})


def planned(capsys, *words: str) -> tuple[int, dict]:
    status = cli.run(["plan", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_plan_of_a_checkpoint_is_its_run(checkpoint, capsys):
    words = ("--checkpoint", str(checkpoint), "--row-tokens", "16", "--compute-dtype", "float32")
    words += ("--remat", "layer")
    status, found = planned(capsys, *words, "--mesh.expert", "4", "--mesh.tensor", "2")
    assert status == 0
    assert found["mesh"] == {"data": 1, "fsdp": 1, "expert": 4, "tensor": 2}
    assert (found["rows"], found["devices"], found["fits"]) == (4, 8, None)
    split = load_for_training(str(checkpoint), "mtp", "float32")
    trained = sum(leaf.size for leaf in jax.tree.leaves(split.trainable))
    assert found["parameters_trained"] == trained
    biases = sum(leaf.nbytes for leaf in jax.tree.leaves(split.biases))
    assert found["checkpoint_bytes"] == 12 * trained + biases + 2 * 4  # moments, two counts
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(split)) + 8 * trained
    assert nbytes / 8 < found["argument_bytes"] < nbytes
    assert found["flops_formula"] < found["flops_compiled"] < 4 * found["flops_formula"]
    assert found["collectives"]["all-to-all"] == sent_by_tokens(open_checkpoint(checkpoint).config)


def sent_by_tokens(c: ModelConfig) -> dict:
    """By each of 4 devices with 16 tokens, in float32; both have one layer with experts.

    Rows go to experts and back; in the gradient rows and what they lead to go there, and what they
    are due comes back. The main model's layer runs once, that of the module twice, as it is
    computed again, and then its gradient; in the first round that needs rows and numbers which were
    just sent for the other. One round of all after the first counts. And both embed by parts of the
    hidden size.
    """
    first = max(FEWEST_SLOTS, math.ceil(16 * c.num_experts_per_tok / 4 * FIRST_ROUND))
    later = max(FEWEST_SLOTS, math.ceil(first * LATER_ROUNDS))
    # Numbers of the experts with each pass; weights of the choices, and theirs back.
    numbers, rows, embedded = 3 + 1 + 2, 2 * 3 + 3, 2
    sent = (numbers + rows * c.hidden_size) * 4 * (first + later) - (1 + c.hidden_size) * 4 * first
    received = (sent + embedded * 16 * c.hidden_size) * 4 * 3 // 4
    return {"count": 2 * (numbers + rows) - 2 + embedded, "received_bytes": received}


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("mode", ["mtp", "lora"])
def test_the_plan_from_captured_states_is_that_of_their_run(mode, checkpoint, capsys):
    """What is not loaded is not planned; what is trained is the same."""
    words = ("--checkpoint", str(checkpoint), "--row-tokens", "16", "--compute-dtype", "float32")
    words += ("--train", mode)
    _, whole = planned(capsys, *words, "--mesh.expert", "4")
    status, found = planned(capsys, *words, "--mesh.expert", "4", "--captured")
    split = load_for_training(str(checkpoint), mode, "float32", scope="mtp")
    frozen = sum(leaf.size for leaf in jax.tree.leaves(nnx.filter_state(split.frozen, nnx.Param)))
    assert (status, found["parameters_frozen"]) == (0, frozen)
    assert frozen < whole["parameters_frozen"]
    assert found["parameters_trained"] == whole["parameters_trained"]
    ratios = [each["flops_compiled"] / each["flops_formula"] for each in (found, whole)]
    assert found["flops_formula"] < whole["flops_formula"]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.3)


@pytest.mark.usefixtures("_uncompiled")
def test_more_meshes_are_tried_and_shown(checkpoint, capsys):
    """As a table too; a mesh of its own for each line, and the other --remat of the best one."""
    words = ["plan", "--checkpoint", str(checkpoint), "--row-tokens", "8", "--search"]
    words += ["--mesh.data", "1", "--mesh.tensor", "2"]
    assert cli.run(words) == 0
    out = capsys.readouterr().out
    assert "here, expert 4, tensor 2" in out
    assert "here, fsdp 4, tensor 2" in out
    assert (out.count("here, "), out.count("--remat ")) == (4, 4 + 1)
    assert "--remat layer" in out
    assert "memory a device" in out
    assert cli.run([*words, "--remat", "none"]) == 0
    assert capsys.readouterr().out.count("--remat none") == 3 + 1


def test_operations_are_counted_as_often_as_they_run():
    """In loops, on every device of a mesh, and of the branch that has the grouped product."""
    square = jnp.ones((8, 8))

    def looped(x):
        return jax.lax.scan(lambda x, _: (x @ square, None), x, length=5)[0]

    def spread(x):
        rows = PartitionSpec("data")
        mesh = make_mesh(data=4, devices=jax.devices()[:4])
        return jax.shard_map(lambda x: x @ square, mesh=mesh, in_specs=rows, out_specs=rows)(x)

    def grouped(x):
        sizes = jnp.array([3, 5], jnp.int32)
        return jax.lax.ragged_dot(x, jnp.ones((2, 8, 8)), sizes)

    def chosen(x):
        return jax.lax.platform_dependent(x, tpu=grouped, default=lambda x: looped(x))

    def unread(x):
        _ = x @ square @ square
        return x @ square

    once = 2 * 8 * 8 * 8
    counts = {
        looped: 5 * once,
        unread: once,
        spread: once,
        grouped: once,
        jax.jit(looped): 5 * once,
    }
    for function, expected in counts.items():
        assert program_flops(jax.make_jaxpr(function)(square).jaxpr) == expected
    assert program_flops(jax.make_jaxpr(chosen)(square).jaxpr) == once


def test_the_formula_is_the_forward_pass_of_the_program(checkpoint):
    """Without a gradient; the program scores every key, the formula those before a token."""
    model = load(checkpoint, dtype=jnp.float32)
    config = model.config
    rows, length = 2, 16
    tokens = jnp.zeros((rows, length), jnp.int32)
    traced = jax.make_jaxpr(lambda tokens: tuple(model(tokens)))(tokens)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    heads = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    unseen = 2 * layers * heads * (length / 2) * rows * length
    # Each weight of `all` counts three times: forward, and two products of the backward pass.
    expected = model_flops(config, "all", rows, length, 1) / 3 + unseen
    counted = program_flops(traced.jaxpr)
    assert counted == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "needed --checkpoint or --model-config"),
        (("--checkpoint", "{}", "--topology", "v7:2x2"), "needed here or a slice of v5e, v5p"),
        (("--checkpoint", "{}", "--topology", "v5p:3x2"), "needed here or one of v5p:2x2x1"),
        (("--checkpoint", "{}", "--topology", "v5p"), "a family: needed a slice, or --search"),
        (("--model-config", "missing.json"), "missing.json"),
        (("--checkpoint", "{}", "--captured", "--train", "all"), "needed --train mtp"),
        (
            ("--checkpoint", "{}", "--captured", "--train", "lora", "--lora.part", "all"),
            "needed --lora.part mtp",
        ),
    ],
)
def test_what_cannot_be_planned(words, said, checkpoint, capsys):
    assert cli.run(["plan", *(word.format(checkpoint) for word in words)]) in (1, 2)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--row-tokens 0", "--row-tokens is 0, needed 3 or more for this model"),
        ("--row-tokens 2", "--row-tokens is 2, needed 3 or more for this model"),
        ("--rows -1", "--rows is -1, needed 0 or more"),
        ("--draft-tokens -1", "--draft-tokens is -1, needed 0 or more"),
        ("--optimizer.ema 2", "--optimizer.ema is 2.0, needed from 0 to less than 1"),
        ("--objective.ce -1", "--objective.ce is -1.0, needed 0 or more"),
        ("--train lora --lora.rank 0", "--lora.rank is 0, needed more than 0"),
        ("--lora.rank 4", "--lora.rank is 4, needed --train lora beside it"),
        ("--detach-main", "--detach-main is True, needed --train all beside it"),
        ("--optimizer.weight-decay-of foo", "--optimizer.weight-decay-of is foo, needed NAME=NUM"),
        ("--optimizer.weight-decay-of foo=1", "--optimizer.weight-decay-of names foo, needed the"),
        ("--mesh.data -1", "--mesh.data is -1, needed 0 or more"),
    ],
)
def test_what_train_refuses_is_not_planned(words: str, said: str, checkpoint, capsys):
    assert cli.run(["plan", "--checkpoint", str(checkpoint), *words.split()]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert not told.out


def test_without_libtpu_it_is_said_what_to_install(monkeypatch, checkpoint, capsys):
    monkeypatch.setattr(slices.importlib.util, "find_spec", lambda _: None)
    words = ("plan", "--checkpoint", str(checkpoint), "--topology", "v5p:2x2x1")
    assert cli.run(words) == 1
    assert "the extra `tpu`" in capsys.readouterr().err


def test_the_compilers_words_are_read():
    """As libtpu says it where a program does not fit, of its temporaries and of all."""
    said = "total memory required for HLO temporaries (512.00G) exceeds available HBM (95.73G)."
    assert slices.memory_in(RuntimeError(said)) == (512 * 2**30, int(95.73 * 2**30))
    said = "Ran out of memory in memory space hbm. Used 133.20G of 95.73G hbm. Exceeded hbm by 37G"
    assert slices.memory_in(RuntimeError(said)) == (int(133.2 * 2**30), int(95.73 * 2**30))
    assert slices.memory_in(RuntimeError("something else")) == (None, None)
    refused = slices.refusal(slices.open_slice(slices.HERE), RuntimeError("E1001: vmem\n" * 999))
    assert str(refused).startswith(
        "here: the compiler refuses the step, not for want of HBM: E1001"
    )
    assert len(str(refused)) < 1000
    assert "LIBTPU" not in str(refused)


@pytest.mark.parametrize(
    ("needed", "in_full", "is_open"),
    [
        (50 * GB, False, False),
        (96 * GB, False, False),
        (98 * GB, False, True),
        (102 * GB, False, True),
        (104 * GB, False, False),
        (None, False, True),  # it does not fit, and by how much is not said
        (98 * GB, True, False),
        (None, True, False),
    ],
)
def test_what_the_first_level_leaves_open(needed: int | None, in_full: bool, is_open: bool):
    assert Compiled(None, needed, 100 * GB, None, in_full).is_open == is_open
    assert not Compiled(None, needed, None, None, in_full).is_open  # nobody could say


@pytest.mark.parametrize(
    ("words", "first", "asked"),
    [
        ((), 50 * GB, [False]),
        ((), 102 * GB, [False, True]),
        ((), 150 * GB, [False]),
        (("--in-full",), 102 * GB, [True]),
    ],
)
def test_close_to_the_limit_a_step_is_compiled_in_full(
    words, first, asked, checkpoint, monkeypatch, capsys
):
    """What is said is what was compiled last. CI has no libtpu: which levels it is asked for."""
    given = []

    def compiled(_lowered, _place, in_full: bool) -> Compiled:
        given.append(in_full)
        return Compiled(None, 99 * GB if in_full else first, 100 * GB, None, in_full)

    monkeypatch.setattr(planning, "compile_step", compiled)
    words = ("--checkpoint", str(checkpoint), "--row-tokens", "16", *words)
    _, found = planned(capsys, *words)
    assert given == asked
    assert found["compiled_in_full"] == asked[-1]
    assert found["total_bytes"] == (99 * GB if asked[-1] else first)


@pytest.mark.parametrize(
    ("kind", "told", "wanted"),
    [
        ("TPU v6 lite", "", {"xla_tpu_scoped_vmem_limit_kib": "98304"}),
        ("TPU v6 lite", "--xla_tpu_scoped_vmem_limit_kib=65536", {}),
        ("TPU v5", "", {}),
        (None, "", {}),
    ],
)
def test_kernels_have_room_on_v6e(kind, told, wanted, monkeypatch):
    """For the devices of the active mesh, which a plan is for; None: for those of this machine."""
    monkeypatch.setenv("LIBTPU_INIT_ARGS", told)
    device = kind and AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((8,), ("data",), abstract_device=device)
    with use_abstract_mesh(mesh) if kind else contextlib.nullcontext():
        assert compiler_options() == wanted


@pytest.mark.parametrize("family", ["v6e", "v5p"])
def test_a_first_level_that_wants_vmem_gives_way_to_compiling_in_full(family):
    """As `train`, which gives a v6e's kernels more; CI has no libtpu to say so itself."""
    asked = []

    def compiled(compiler_options):
        asked.append({name: compiler_options.get(name) for name in (LEVEL, VMEM_LIMIT)})
        if LEVEL in compiler_options:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom")
        return SimpleNamespace(memory_analysis=lambda: MEMORY)

    known = slices.FAMILIES[family]
    place = slices.Slice(name=f"{family}:2x4", devices=[], chips=8, memory=GB, family=known)
    lowered: Any = SimpleNamespace(compile=compiled)
    found = slices.compile_step(lowered, place, in_full=False)
    assert (found.in_full, found.needed) == (True, 2 + (3 - 4) + 5)
    first = {LEVEL: 19, VMEM_LIMIT: "32768" if family == "v6e" else None}
    assert asked == [first, {LEVEL: None, VMEM_LIMIT: None}]


@follows("; set LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=98304 and run it again")
def test_want_of_vmem_is_told_with_the_flag_that_helped():
    """It did for V3 from captured states on v6e:2x4, where it is now set (docs/performance.md); CI
    has no libtpu."""
    said = "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory\n" * 99
    refused = str(slices.refusal(slices.open_slice(slices.HERE), RuntimeError(said)))
    assert refused.endswith("=--xla_tpu_scoped_vmem_limit_kib=98304 and run it again")


def test_a_config_alone_says_what_is_stored_in_fp8(checkpoint, tmp_path, capsys):
    """Without a converted checkpoint: the same weights, and the same bytes, as with one."""
    stored = open_checkpoint(checkpoint)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(stored.config.to_dict()))
    assert ModelConfig.from_dict(json.loads(file.read_text())) == stored.config
    words = ("--row-tokens", "8", "--mesh.data", "1", "--mesh.expert", "1", "--mesh.tensor", "1")
    words = (*words, "--mesh.fsdp", "1")
    (_, by_config), (_, by_checkpoint) = (
        planned(capsys, *source, *words)
        for source in (("--model-config", str(file)), ("--checkpoint", str(checkpoint)))
    )
    assert by_config["argument_bytes"] == by_checkpoint["argument_bytes"]
    wider = planned(capsys, "--checkpoint", str(checkpoint), *words, "--stored", "bf16")[1]
    assert wider["argument_bytes"] > by_config["argument_bytes"]
