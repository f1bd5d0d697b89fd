"""Campaign: `unisono verify` raises no false alarm on ordinary scripts, the demos, and the README's.

Run it by hand (minutes): ``python tests/campaigns/verify_ordinary.py [NAME...]``. It prints a line a script and ends with
status 1 if any script was not found equal.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from unisono.verify.inquiry import inquire
from unisono.verify.servers import ForkServers

ROOT = Path(__file__).parent.parent.parent
WORKERS = (2, 3, 4)


def scripts(folder: Path) -> dict[str, Path]:
    """By name."""
    found = {path.stem: path for path in sorted((ROOT / "tests/verify/ordinary").glob("*.py"))}
    found |= {f"demo {path.stem}": path for path in sorted((ROOT / "src/unisono/demos").glob("[!_]*.py"))}
    readme = folder / "readme.py"
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    readme.write_text(next(block for block in blocks if "def main():" in block))
    return {**found, "README": readme}


def main(wanted: list[str]) -> int:
    alarms = 0
    with tempfile.TemporaryDirectory() as folder, ForkServers() as servers:
        for name, path in scripts(Path(folder)).items():
            if wanted and name not in wanted:
                continue
            report = inquire(str(path), workers=WORKERS, servers=servers)
            alarms += report.verdict != "equal"
            causes = ", ".join(cause.name for cause in report.causes)
            problem = report.problem or (report.reference.problem if report.reference else "")
            print(f"{name:20} {report.verdict:10} {report.runs:3} runs {report.seconds:6.1f} s  {causes} {problem}", flush=True)
            if report.reference is not None:
                for quantity in report.reference.distance.steps:
                    apart, explained = report.reference.distance, report.reference.rounding
                    print(
                        f"    {quantity:16} {apart.usual(quantity):.1e} beside {explained.usual(quantity):.1e} explained",
                        flush=True,
                    )
    return int(alarms > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
