"""How fast a module that `new-mtp` made learns, by objective: the demo's model without its own.

    make demo                                  # or any other folder with a released model and text
    python -m tools.bench_new_module --demo demo-run --out new-module-run

The MTP module is left out of the demo's checkpoint, a new one is made of its last main layer, and
trained by each objective on the demo's prose. Measured on held-out text as a decoder drafts. One
seed. What is there is not done again.
"""

import argparse
import json
import shutil
from pathlib import Path

from tools.demo import run_command

OBJECTIVES = ("lk", "kl", "tv", "e2e-tv", "ce")


def main() -> None:
    parser = argparse.ArgumentParser(description="A new MTP module, by objective.")
    parser.add_argument("--demo", type=Path, default=Path("demo-run"), help="a finished demo")
    parser.add_argument("--out", type=Path, default=Path("new-module-run"))
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--every", type=int, default=40, help="steps between evaluations")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES)
    arguments = parser.parse_args()
    out, text = arguments.out, arguments.demo / "text"
    if not (out / "checkpoint" / "COMPLETE").exists():
        without_module(arguments.demo / "released", out / "alone")
        run_command("convert-deepseek", "new-mtp", out / "alone", out / "draft", "--overwrite")
        imported = ("import", out / "alone", out / "checkpoint", "--mtp-from", out / "draft")
        run_command("convert-deepseek", *imported)
    for objective in arguments.objectives:
        run = out / objective
        if not (run / "final" / "COMPLETE").exists():
            run_command(
                *("finetune-deepseek", "train", "--checkpoint", out / "checkpoint", "--out", run),
                *("--data", text / "prose.jsonl", "--eval-data", text / "prose-held-out.jsonl"),
                *("--batch.rows", 16, "--batch.row-tokens", 128, "--steps", arguments.steps),
                *("--optimizer.learning-rate", arguments.learning_rate, "--draft-tokens", 3),
                *("--evaluation.every", arguments.every, "--checkpoints.every", arguments.steps),
                *(f"--objective.{objective}", 1),
            )
    found = {objective: evaluations(out / objective) for objective in arguments.objectives}
    steps = [each["step"] for each in next(iter(found.values()))]
    print("| step |", " | ".join(map(str, steps)), "|")
    print("|---" * (1 + len(steps)), "|", sep="")
    for objective, measured in found.items():
        cells = (
            f"{each['mean_accepted_length']:.2f} ({each['overlap'][0]:.2f})" for each in measured
        )
        print(f"| {objective} |", " | ".join(cells), "|")


def without_module(released: Path, alone: Path) -> None:
    """The released checkpoint as tools leave it that do not know MTP modules."""
    shutil.rmtree(alone, ignore_errors=True)
    alone.mkdir(parents=True)
    config = json.loads((released / "config.json").read_text())
    index: dict[str, str] = {}
    module = f"model.layers.{config['num_hidden_layers']}."
    for file in sorted(released.glob("*.safetensors")):
        content = file.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        header, parts, end = {}, [], 0
        for name, tensor in json.loads(content[8:begin]).items():
            if name != "__metadata__" and not name.startswith(module):
                first, last = tensor["data_offsets"]
                parts.append(content[begin + first : begin + last])
                header[name] = {**tensor, "data_offsets": [end, end + last - first]}
                end += last - first
        if parts:
            raw = json.dumps(header).encode()
            (alone / file.name).write_bytes(b"".join([len(raw).to_bytes(8, "little"), raw, *parts]))
            index |= dict.fromkeys(header, file.name)
    (alone / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (alone / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (released / name).exists():
            shutil.copy(released / name, alone)


def evaluations(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
