"""python -m tests.mutation: do the tests notice when the sources are wrong?

    make mutate                                      12 mutants of each language
    make mutate MUTATE="--sample 300 cpp"            300 of the C++ kernels
    make mutate MUTATE="--since main --sample 12"    12 in the files that differ from main
    make mutate MUTATE="--sample 200 --first 120 python"    the last 80 of 200, to split a sample
    make mutate MUTATE="--names FILE python"         those named in FILE, one per line, such as survivors

Each mutant is one small change (see python_source.py and cpp_source.py).  The tests of its file run
with -x, starting with those that killed the last mutants; a mutant that passes all of them survives.  The
exit status is 1 if any survivor is not explained in survivors.txt.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from . import cpp_source, python_source, survivors
from .mutants import Mutant, is_wanted, sample
from .suites import LANGUAGES, ROOT, sources, tests_of
from .workspace import Workspace


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("languages", nargs="*", help=f"{', '.join(LANGUAGES)} (default: all)")
    parser.add_argument("--sample", type=int, default=12, help="mutants per language")
    parser.add_argument("--first", type=int, default=0, help="index in the sample to start from")
    parser.add_argument("--names", type=Path, help="file of mutants' names, overrides --sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", default="", help="a regular expression for the paths of files")
    parser.add_argument(
        "--since",
        help="only files that differ from this commit, with one sample over all languages",
    )
    parser.add_argument("--isa", default="portable", help="instruction set of the C++ build")
    parser.add_argument("--timeout", type=float, default=900, help="seconds per mutant")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/mutation")
    parser.add_argument("--no-baseline", action="store_true", help="skip the run without a mutant")
    args = parser.parse_args(argv)
    unknown = set(args.languages) - LANGUAGES.keys()
    if unknown:
        parser.error(f"languages: expected some of {', '.join(LANGUAGES)}, got {unknown.pop()}")
    picked = pick(args)
    if not any(picked.values()):
        print("mutation: nothing to mutate in these files")
        return 0
    known, alive, total = survivors.read(), [], 0
    for language, (wanted, spare) in picked.items():
        for mutant, verdict in hunt(args, language, wanted, spare):
            total += 1
            state = f"killed by {verdict.by}" if verdict.killed else "SURVIVED"
            if not verdict.killed and mutant.name in known:
                state = f"equivalent: {known[mutant.name]}"
            elif not verdict.killed:
                alive.append(mutant)
            elif mutant.name in known:
                state += " (listed in survivors.txt: remove it)"
            print(
                f"{language:<7} {verdict.seconds:5.0f} s  {mutant.name}\n{'':17}{state}", flush=True
            )
    print(f"\nmutation: {total - len(alive)} of {total} killed or equivalent, seed {args.seed}")
    for mutant in alive:
        print(f"  survived: {mutant.file}:{mutant.line} ({mutant.kind})\n    {mutant.name}")
    return 1 if alive else 0


def pick(args) -> dict[str, tuple[list[Mutant], list[Mutant]]]:
    """{language: (the sample, the other mutants in sampling order)}."""
    languages = args.languages or list(LANGUAGES)
    changed = changed_since(args.since) if args.since else None
    found = {}
    for language in languages:
        files = [f for f in sources(language) if changed is None or f in changed]
        found[language] = [m for m in mutants(language, files) if is_wanted(args.files)(m)]
    if args.names:
        names = {line.strip() for line in args.names.read_text().splitlines()}
        return {k: ([m for m in v if m.name in names], []) for k, v in found.items()}
    if changed is None:
        shuffled = {k: sample(v, len(v), args.seed) for k, v in found.items()}
        sizes = dict.fromkeys(found, args.sample)
    else:  # one sample over all languages
        every = [m for v in found.values() for m in v]
        first = {m.name for m in sample(every, args.sample, args.seed)}
        shuffled = {
            k: sorted(sample(v, len(v), args.seed), key=lambda m: m.name not in first)
            for k, v in found.items()
        }
        sizes = {k: sum(m.name in first for m in v) for k, v in found.items()}
    picked = {k: (v[args.first : sizes[k]], v[sizes[k] :]) for k, v in shuffled.items()}
    return {k: v for k, v in picked.items() if v[0]}


def changed_since(commit: str) -> set[str]:
    command = ["git", "diff", "--name-only", commit, "--"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mutation: --since {commit}: {done.stderr.strip()}")
    return set(done.stdout.split())


def mutants(language: str, files) -> list[Mutant]:
    generate = cpp_source.mutants if language == "cpp" else python_source.mutants
    return [m for file in files for m in generate(file, (ROOT / file).read_bytes())]


def hunt(args, language, wanted, spare):
    """Yields (mutant, verdict) for each mutant."""
    space = Workspace(args.folder / language, language, args.isa, args.timeout)
    chosen = dict(enumerate(wanted, 1))
    if language == "cpp":
        chosen = space.build(wanted, spare)
    if not args.no_baseline:
        tests = list(dict.fromkeys(t for m in chosen.values() for t in tests_of(m.file)))
        verdict = space.judge(None, tests=tests)
        if verdict.killed:
            sys.exit(f"mutation: the tests fail without a mutant:\n{verdict.by}")
        print(f"{language}: {', '.join(tests)} pass without a mutant in {verdict.seconds:.0f} s")
    for number, mutant in chosen.items():
        yield mutant, space.judge(mutant, number)


if __name__ == "__main__":
    raise SystemExit(main())
