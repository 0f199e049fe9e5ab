"""The golden loss traces: short runs on the digits at a fixed seed, which no refactor may change.

`make golden` writes tests/golden.json anew. Do that only for a change that is meant to change what is learned, and say
so in its commit message.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import SMALL, environment, train_command

FILE = Path(__file__).parent / "golden.json"
FLOW = [
    *("--model.name=spatial", "--model.code=2", "--objective.third=none", "--objective.imle=0"),
    *("--objective.reconstruction=0", "--objective.denoising=1", "--objective.damage=mild"),
    *("--prior.name=flow", "--prior.width=16", "--prior.depth=1"),
    *("--prior.batch=64", "--prior.passes=2", "--prior.images=1024"),
]
TRACES = {
    "naign": ["--latents.name=gaussian", "--objective.third=none", "--objective.imle=1", "--objective.denoising=0"],
    "naign denoising": [
        "--objective.third=none",
        *("--objective.imle=1", "--objective.denoising=1", "--objective.damage=noise"),
        "--train.passes=2",
        "--latents.name=gaussian",
        "--seed=5",
    ],
    "naign matched": [
        *("--objective.third=matched", "--objective.distance=norm", "--latents.name=smooth", "--train.ema=0.9"),
        "--latents.white=0",
        *("--objective.imle=1", "--objective.denoising=0"),
    ],
    "ign": ["--objective.name=ign", "--objective.reconstruction=20", "--latents.name=fourier"],
    "flow of codes": FLOW,
    "mixture of codes": [
        *("--objective.third=none", "--objective.imle=0.3", "--prior.name=gmm", "--prior.components=3"),
        *("--objective.denoising=0", "--latents.white=0"),
    ],
}
RECIPE = [
    *(
        "--train.optimizer=adamw",
        "--train.lr=2e-3",
        "--train.lr_end=1e-5",
        "--train.weight_decay=0.01",
        "--train.clip=1",
    ),
    *("--model.depth=1", "--objective.distance=l1"),
]
"""Said outright, so that a better default does not touch the traces; a trace's own settings come before these."""
ROUNDS = 6


def trace(name: str, data: str, folder: Path, env: dict[str, str] | None = None) -> list[dict[str, float]]:
    """The losses of each round of one short run, and of the fitted prior, by name."""
    passes = 2 if "--train.passes=2" in TRACES[name] else 1
    small = [option for option in SMALL if name != "ign" or not option.startswith("--objective")]
    options = [f"--data.path={data}", f"--run.path={folder}", f"--train.images={256 * ROUNDS * passes}", *small]
    own = {option.partition("=")[0] for option in TRACES[name]}
    recipe = [option for option in RECIPE if option.partition("=")[0] not in own]
    command = train_command(*options, *recipe, *TRACES[name])
    subprocess.run(command, env=env or environment(), check=True, capture_output=True)
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in entry.items() if key.startswith(("loss/", "prior/")) or key == "match/distance"}
        for entry in entries
        if entry["train/stage"] == 1 or entry["prior/fitted"] == 1
    ]


def main() -> None:
    from naign.data.format.writer import pack
    from naign.data.sources.catalog import load

    with tempfile.TemporaryDirectory() as place:
        pack(load("digits"), f"{place}/data", shards=4)
        traces = {name: trace(name, f"{place}/data", Path(place) / name.replace(" ", "-")) for name in TRACES}
    FILE.write_text(json.dumps(traces, indent=1) + "\n")
    print(f"written: {FILE}", file=sys.stderr)


if __name__ == "__main__":
    main()
