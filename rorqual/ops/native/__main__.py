"""`python -m rorqual.ops.native`: compile the CPU kernels now, so that the first start does not wait for it."""

from rorqual.errors import BackendUnavailable
from rorqual.ops.native.build import build

try:
    print(build())
except BackendUnavailable as error:
    print(f"{error}; the engine will compute with torch, more slowly")
