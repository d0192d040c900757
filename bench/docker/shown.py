"""Looks for each block of a Dockerfile in the README: its lines must stand in a file of deploy/, one after the other."""

import pathlib
import re
import sys

repository = pathlib.Path(sys.argv[1])
files = [path for path in (repository / "deploy").rglob("*") if path.name.endswith("Dockerfile")]
texts = ["\n" + path.read_text() for path in files]
blocks = re.findall(r"^```dockerfile\n(.*?)^```", (repository / "README.md").read_text(), re.MULTILINE | re.DOTALL)
if not blocks:
    print("SKIPPED: the README shows no Dockerfile", file=sys.stderr)
for block in blocks:
    if not any("\n" + block in text for text in texts):
        sys.exit(f"this block of the README stands in no file of deploy/:\n{block}")
