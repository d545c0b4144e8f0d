#!/bin/sh
# mypyc takes a ClassVar of a dataclass for a field, so a class that Python accepts cannot be imported once compiled.
set -eu
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
python3 -m venv "$temporary/venv"
"$temporary/venv/bin/pip" install -qq --disable-pip-version-check mypy==2.4.1 setuptools
cd "$temporary"
cat >point.py <<'EOF'
from dataclasses import dataclass
from typing import ClassVar

@dataclass
class Point:
    kind: ClassVar[str] = "point"
    x: int

print(Point(1))
EOF
PATH=$temporary/venv/bin:$PATH
python --version
mypy --version
echo "interpreted: $(python -c 'import point')"
mypyc point.py >said 2>&1 || { cat said; exit 1; }
echo "compiled: $(python -c 'import point' 2>&1 | tail -n 1)"
python -c 'import point' 2>&1 | grep -q "non-default argument 'x' follows default argument"
