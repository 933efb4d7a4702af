"""One host of several that decode together: run as a program by test_10_decoding.py. Writes what it was given."""

import json
import sys
from pathlib import Path

from mmrlhf_jax.training.distributed import join_processes

if __name__ == "__main__":
    join_processes()
    import jax

    sys.path.append(str(Path(__file__).parent / "laws"))
    from test_10_decoding import DRAWN, RUN, made_groups, said

    from mmrlhf_jax.nn.sharding import MeshConfig, make_mesh

    rendering: list[int] = []
    found = said(made_groups(), DRAWN, RUN, make_mesh(MeshConfig(**json.loads(sys.argv[2]))), rendering=rendering)
    flat = [[[list(sample.token), sample.ended, sample.score] for sample in prefix] for one in found for prefix in one]
    output = Path(sys.argv[1]) / f"{jax.process_index()}.json"
    output.write_text(json.dumps({"said": flat, "rendered": sorted(rendering)}))
