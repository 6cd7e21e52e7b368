"""The records of benchmarks: importing this makes `import benchmarks` possible, and lets them be read and checked."""

import json
import re
import sys

from support import ROOT

sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

README = (ROOT / "benchmarks" / "README.md").read_text()
# The first column of the tables under the headings that define keys.
DEFINED = set(
    re.findall(r"`(\w+)`", " ".join(re.findall(r"^\|([^|]*)\|", README.partition("### Keys")[2], re.MULTILINE)))
)
MINIMAL = ["--seconds", "0.001", "--minimum-repeats", "2"]


def records_of(path):
    fingerprint, *rows = map(json.loads, path.read_text().splitlines())
    assert fingerprint["record"] == "fingerprint"
    assert {row["record"] for row in rows} == {"row"}
    undefined = {key for record in (fingerprint, *rows) for key in record} - DEFINED
    assert not undefined, f"benchmarks/README.md does not define {undefined}"
    return fingerprint, rows
