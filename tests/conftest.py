"""Every test sees 8 virtual CPU devices, and compiled programs are kept between runs."""

import os
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# compiling takes longer than running models of this size: half the time without LLVM's optimisation
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {FAST_COMPILE}")
# threads of XLA's CPU runtime. It has one a device otherwise; a device that waits for others in a collective holds one,
# and two programs in flight can then hold all of them, each waiting for a partner that finds none
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "mmrlhf-test-compilation-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# libtpu serves one process, for the devices' sake; tests in several processes only compile with it
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

sys.path.insert(0, str(Path(__file__).resolve().parent))  # helpers such as tests/tiny.py

import pytest  # noqa: E402 - jax reads the environment when a test imports it


@pytest.fixture(autouse=True)
def _default_precision():
    """A run in fp32 asks the whole process for exact products, which a later test's bf16 kernels cannot compile."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_default_matmul_precision", None)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    from small_world import make_small_world

    return make_small_world(tmp_path_factory.mktemp("small-world"))


@pytest.fixture(scope="session")
def _object_store():
    from object_store import object_store

    with object_store():
        yield


@pytest.fixture
def gs(_object_store):
    """An empty place in a bucket: gs://..."""
    import uuid

    from object_store import BUCKET

    return f"gs://{BUCKET}/{uuid.uuid4().hex}"
