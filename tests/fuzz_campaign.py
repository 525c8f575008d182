"""Draw new examples for every property-based test, and print a table: `python -m tests.fuzz_campaign --minutes 30`.

The minutes are shared evenly by the subjects. A subject's tests are run again with another seed until its share is over, so a
subject takes at least one round. Failing examples are printed, not shrunk, and the exit status is 1.
"""

import argparse
import re
import sys
import time
from collections import Counter

import pytest

SUBJECTS = {
    "command line and config.json": ("tests/config/test_config_fuzz.py",),
    "combined settings": ("tests/training/test_any_configuration.py",),
    "prompts": ("tests/prompts",),
    "files of a run": ("tests/integration/test_run_folder_fuzz.py",),
    "models and LoRAs": ("tests/models/test_folder_fuzz.py",),
    "noise schedules": ("tests/models/test_known_configuration.py",),
    "rewards": ("tests/rewards/test_reward_fuzz.py",),
    "printed text": ("tests/utils/test_printable.py",),
}
PASSING = re.compile(r"(\d+) passing")


class Counting:
    """A plugin of pytest that counts examples, from hypothesis's statistics of each test."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.counts["failed tests"] += report.failed

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        statistics = getattr(item, "hypothesis_statistics", "")  # set by hypothesis's own plugin
        self.counts["examples"] += sum(map(int, PASSING.findall(statistics)))


def campaign(files: tuple[str, ...], seconds: float, first_seed: int) -> tuple[Counter[str], int]:
    """Run the property-based tests of `files` until `seconds` have passed; the counts, and the number of rounds."""
    counting, rounds, end = Counting(), 0, time.monotonic() + seconds
    while rounds == 0 or time.monotonic() < end:
        options = ["-m", "hypothesis", "--hypothesis-profile=campaign", f"--hypothesis-seed={first_seed + rounds}"]
        options += ["-p", "no:cacheprovider", "-p", "no:logging", "--quiet", "--no-header", "--tb=short"]
        status = pytest.main([*options, *files], plugins=[counting])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise SystemExit(f"pytest ended with {status!r}")
        rounds += 1
    return counting.counts, rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="of all subjects together")
    parser.add_argument("--seed", type=int, default=0, help="of the first round of each subject")
    parser.add_argument("--subject", choices=SUBJECTS, nargs="+", default=list(SUBJECTS))
    options = parser.parse_args()
    rows = {}
    for subject in options.subject:
        seconds = 60 * options.minutes / len(options.subject)
        rows[subject] = campaign(SUBJECTS[subject], seconds, options.seed)
    print("\n| subject | rounds | examples | failed tests |\n| --- | --- | --- | --- |")
    for subject, (counts, rounds) in rows.items():
        print(f"| {subject} | {rounds} | {counts['examples']:,} | {counts['failed tests']} |")
    return int(any(counts["failed tests"] for counts, _ in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
