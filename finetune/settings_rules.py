"""What values the settings of a run may have; all that is wrong is said together."""

import re
from collections.abc import Container
from typing import Any

from finetune.settings import (
    RunSettings,
    SettingsError,
    blank,
    flat,
    is_finite,
    not_finite,
    option,
    weight_faults,
)

MESH = ("mesh.data", "mesh.fsdp", "mesh.expert", "mesh.tensor")
POSITIVE = (
    "objective.depth_decay",
    "steps",
    "batch.rows",
    "batch.accumulation",
    "lora.rank",
    "lora.alpha",
    "optimizer.learning_rate",
    "optimizer.epsilon",
    "optimizer.clip_norm",
    "evaluation.every",
    "evaluation.rows",
    "checkpoints.every",
    "checkpoints.keep",
)
NOT_NEGATIVE = (
    "rows",
    "mtp_lambda",
    "mtp_lambda_end",
    "draft_tokens",
    "objective.ce",
    "objective.kl",
    "objective.tv",
    "objective.lk",
    "objective.e2e_tv",
    "router_bias_rate",
    "seed",
    "optimizer.weight_decay",
    "evaluation.holdout_every",
    "checkpoints.keep_every",
    *MESH,
)
FRACTIONS = ("optimizer.warmup_fraction", "optimizer.final_fraction")
BELOW_ONE = ("optimizer.beta1", "optimizer.beta2", "optimizer.ema")
OF_A_MAIN_MODEL_THAT_LEARNS = (
    "mtp_lambda",
    "mtp_lambda_schedule",
    "mtp_lambda_end",
    "detach_main",
)


def short_rows(name: str, row_tokens: int, draft_tokens: int, num_modules: int) -> list[str]:
    """What is wrong with rows in which no token has a target at every depth; name: the option."""
    least = (draft_tokens or num_modules) + 2
    if row_tokens >= least:
        return []
    return [f"{name} is {row_tokens}, needed {least} or more for this model"]


_RULES = (
    (POSITIVE, lambda value: value > 0, "more than 0"),
    (NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
    (FRACTIONS, lambda value: 0 <= value <= 1, "from 0 to 1"),
    (BELOW_ONE, lambda value: 0 <= value < 1, "from 0 to less than 1"),
    (("batch.row_tokens",), lambda value: value >= 2, "2 or more"),
    (("evaluation.holdout_every",), lambda value: value != 1, "0, or 2 and more"),
)


def check(settings: RunSettings) -> None:
    """Raise SettingsError with everything that is wrong with the values."""
    weighed = "folders of --states" if settings.states else "paths of --data"
    paths = settings.states or settings.data
    faults = _sources(settings) + weight_faults(settings.data_weights, paths, weighed)
    faults += value_faults(settings)
    if settings.batch.rows % max(settings.batch.accumulation, 1):
        found = f"{option('batch.accumulation')} is {settings.batch.accumulation}"
        faults.append(f"{found}, needed a divisor of the {settings.batch.rows} rows of a batch")
    if faults:
        raise SettingsError("settings that cannot be used", faults)


def value_faults(settings: Any) -> list[str]:
    """What is wrong with the values of a run, or of a plan, which has some of its settings."""
    values, infinite = flat(settings), not_finite(settings)
    faults = [*infinite.values()]
    faults += [
        f"{option(name)} is {values[name]}, needed {needed}"
        for names, good, needed in _RULES
        for name in names
        if name in values and name not in infinite and not good(values[name])
    ]
    faults += _decays(settings.optimizer.weight_decay_of)
    return faults + _without_effect(settings, infinite)


def _without_effect(settings: Any, infinite: Container[str]) -> list[str]:
    """Settings that say what a run like this one never asks: somebody expects another run."""
    values, usual = flat(settings), flat(blank())
    beside: dict[str, str] = {}
    if settings.train != "lora":
        beside |= {f"lora.{name}": "--train lora" for name in flat(settings.lora)}
    if settings.part == "mtp":
        all_of = "--lora.part all" if settings.train == "lora" else "--train all"
        beside |= dict.fromkeys(OF_A_MAIN_MODEL_THAT_LEARNS, all_of)
    elif values.get("mtp_lambda_schedule") == "constant":
        beside["mtp_lambda_end"] = "--mtp-lambda-schedule linear or step"
    if not values.get("states"):
        beside["skip_unusable"] = "--states"
    beside |= _of_no_optimizer(settings)
    if values.get("optimizer.schedule") == "constant":
        beside["optimizer.final_fraction"] = "--optimizer.schedule cosine, linear or wsd"
    # The default is e2e_tv with a frozen main model; modules that are new can name their lk.
    if not {*settings.objective.weights()} - {"e2e_tv"} and settings.part == "mtp":
        beside["objective.depth_decay"] = "--objective.ce, kl, tv or lk"
    return [
        f"{option(name)} is {values[name]}, needed {needed} beside it"
        for name, needed in beside.items()
        if name in values and name not in infinite and values[name] != usual[name]
    ]


def _of_no_optimizer(settings: Any) -> dict[str, str]:
    """Settings of an optimizer that what learns, or the optimizer itself, has no use for."""
    found: dict[str, str] = {}
    name = settings.optimizer.name
    if settings.train == "lora":
        found["router_bias_rate"] = "--train mtp or all"
        if name == "muon":  # all but projections are AdamW's, and adapters are none
            found["optimizer.name"] = "--train mtp or all"
    unused = {"adafactor": ("beta1", "beta2", "epsilon"), "muon": ("epsilon",)}.get(name, ())
    return found | {f"optimizer.{each}": "--optimizer.name adamw" for each in unused}


def _decays(groups: tuple[str, ...]) -> list[str]:
    """What is wrong with weight decays of some weights."""
    faults, seen = [], set()
    for each in groups:
        name, _, value = each.rpartition("=")
        is_number = re.fullmatch(r"\d+(\.\d*)?(e-?\d+)?", value) and is_finite(float(value))
        if not name or not is_number:
            faults.append(f"--optimizer.weight-decay-of is {each}, needed NAME=NUMBER, 0 or more")
        elif name in seen:
            faults.append(f"--optimizer.weight-decay-of names {name} twice: needed one number")
        seen.add(name)
    return faults


def _sources(settings: RunSettings) -> list[str]:
    """What is wrong with where a run gets its text from."""
    if not settings.states:
        return [] if settings.data else ["--data is (), needed at least one path, or --states"]
    faults = ["--states is given with --data: needed one of them"] if settings.data else []
    if settings.part != "mtp":
        what = "--lora.part" if settings.train == "lora" else "--train"
        needed = "needed mtp with --states: no main model is there"
        faults.append(f"{what} is {settings.part}, {needed}")
    return faults
