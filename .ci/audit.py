"""Fail if an installed package has a known vulnerability that a newer version mends.

The argument is the JSON that pip-audit has written. Where it has written none, the network was cut off meanwhile.
"""

import json
import sys
from pathlib import Path

path = Path(sys.argv[1])
if not path.exists():
    sys.exit(print("known vulnerabilities: skipped, pip-audit has come to no end"))
vulnerabilities = [
    (package["name"], package["version"], vulnerability["id"], vulnerability["fix_versions"])
    for package in json.loads(path.read_text())["dependencies"]
    for vulnerability in package.get("vulns", [])
]
for name, version, vulnerability, fixes in vulnerabilities:
    print(f"{name} {version}: {vulnerability}, {'mended in ' + ', '.join(fixes) if fixes else 'not mended yet'}")
sys.exit(any(fixes for *_, fixes in vulnerabilities))
