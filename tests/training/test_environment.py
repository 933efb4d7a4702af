"""A run says what it ran on, each time it starts or goes on, and nothing about whose machine that was."""

from __future__ import annotations

import getpass
import json
import platform

from mmrlhf_jax.nn.sharding import MeshConfig, make_mesh
from mmrlhf_jax.training.environment import note_environment
from mmrlhf_jax.training.run import RunDirectory


def test_every_start_has_a_line_of_its_own(tmp_path):
    run, mesh = RunDirectory.at(tmp_path), make_mesh(MeshConfig())
    for step in (0, 40):
        note_environment(run, step, mesh)
    first, second = map(json.loads, run.environment.read_text().splitlines())
    assert (first["step"], second["step"]) == (0, 40)
    assert first | {"step": 40} == second
    assert first["backend"] == "cpu"
    assert first["devices"] == mesh.size
    assert first["mesh"] == dict(mesh.shape)
    assert {"jax", "jaxlib", "optax", "numpy"} <= first["packages"].keys()


def test_no_machine_user_or_place_is_named(tmp_path):
    run = RunDirectory.at(tmp_path)
    note_environment(run, 0, make_mesh(MeshConfig()))
    text = run.environment.read_text()
    assert platform.node() not in text
    assert f'"{getpass.getuser()}"' not in text
    assert str(tmp_path) not in text
