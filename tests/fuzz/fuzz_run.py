"""`make fuzz [SECONDS=60] [TARGET=NAME[,NAME…]] [SEED=0]`: looks for inputs that break a target.

With atheris (the extra `fuzz`; libFuzzer, which goes by what code an input reaches), else with the
mutator of fuzz_draw.py. Each target for so many seconds, in a process of its own. An input that
breaks one is written to crash-TARGET-…, with its traceback; when it is mended it goes into
tests/fuzz/corpus/TARGET/ under a name that begins with `found-`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

RECEIVER = "receiver"


def _atheris(name: str, seconds: float, seed: int) -> None:
    """Does not come back."""
    import atheris

    with atheris.instrument_imports(include=["pageferry"]):
        import fuzz_targets

    found = tempfile.mkdtemp(prefix=f"fuzz-{name}-")
    atheris.Setup(
        [
            name, found, str(fuzz_targets.CORPUS / name), f"-max_total_time={seconds:.0f}",
            f"-seed={seed + 1}", "-max_len=65536", f"-artifact_prefix=crash-{name}-",
            "-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1",
        ],
        fuzz_targets.TARGETS[name],
    )  # fmt: skip
    atheris.Fuzz()


def _plain(name: str, seconds: float, seed: int) -> int:
    import fuzz_targets
    from fuzz_draw import mutants

    target, inputs, began = fuzz_targets.TARGETS[name], 0, time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in mutants(fuzz_targets.corpus(name), seed):
        try:
            target(data)
        except Exception:
            where = f"crash-{name}-{hashlib.sha256(data).hexdigest()[:16]}"
            Path(where).write_bytes(data)
            traceback.print_exc()
            print(f"{name}: broken by {where}")
            return 1
        inputs += 1
        if inputs % 64 == 0 and time.monotonic() - began > seconds:
            break
    took = time.monotonic() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    fuzz_targets.close()
    print(f"{name}: {inputs} inputs, {inputs / took:.0f} a second, peak memory +{grown >> 10} MiB")
    return 0


def _summary(name: str, said: str) -> str:
    """One line of what libFuzzer prints."""
    done = re.findall(r"^#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+)", said, re.MULTILINE)
    if not done:
        return said
    inputs, edges, features = map(int, done[-1])
    took = re.findall(r"^Done \d+ runs in (\d+) second", said, re.MULTILINE)
    seconds = max(1, int(took[-1])) if took else 1
    peak = re.findall(r"stat::peak_rss_mb:\s+(\d+)", said)
    return (
        f"{name}: {inputs} inputs, {inputs / seconds:.0f} a second, {edges} edges, "
        f"{features} features, peak memory {peak[-1] if peak else '?'} MiB (atheris)"
    )


def _in_process(name: str, engine: str, seconds: float, seed: int) -> int:
    command = [sys.executable, __file__, "--one", engine, "--target", name, "--seconds",
               str(seconds), "--seed", str(seed)]  # fmt: skip
    if engine == "plain":
        return subprocess.run(command, check=False).returncode
    with tempfile.TemporaryDirectory() as own:  # of what libFuzzer finds on its way
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=_environment(own)
        )
    print(_summary(name, done.stdout + done.stderr), flush=True)
    return done.returncode


def _environment(folder: str) -> dict[str, str]:
    import os

    return {**os.environ, "TMPDIR": folder}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--target", default="", help="all if it is not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("atheris", "plain", ""), default="")
    parser.add_argument("--one", choices=("atheris", "plain"), help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.one == "atheris":
        _atheris(said.target, said.seconds, said.seed)
    if said.one == "plain":
        return _plain(said.target, said.seconds, said.seed)
    import fuzz_targets  # not before: atheris looks at code while it is imported

    engine = said.engine or ("atheris" if importlib.util.find_spec("atheris") else "plain")
    names = [name for name in said.target.split(",") if name] or [*fuzz_targets.TARGETS, RECEIVER]
    if unknown := set(names) - {*fuzz_targets.TARGETS, RECEIVER}:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are "
                     f"{', '.join([*fuzz_targets.TARGETS, RECEIVER])}")  # fmt: skip
    failed = 0
    for name in names:
        if name == RECEIVER:
            import fuzz_receiver

            failed |= fuzz_receiver.main(said.seconds, said.seed)
        else:
            failed |= _in_process(name, engine, said.seconds, said.seed)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
