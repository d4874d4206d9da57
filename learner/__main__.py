"""``python -m learner CONFIG [key.sub=value ...]``, also under torchrun; plain lines only.

    torchrun --nproc-per-node 8 -m learner CONFIG       a learner on eight GPUs

``--resume FOLDER`` in the place of CONFIG continues a run.
"""

import logging
import sys
from pathlib import Path

from learner.config.file import load_config
from learner.run_folder import RunFolder
from protocol.errors import AsyncGdpoError, ConfigError
from protocol.process import leave, torchrun_rank


def main(arguments: list[str]) -> int:
    """Run a learner as the command line says; returns the exit code."""
    resume = arguments[:1] == ["--resume"]
    arguments = arguments[resume:]
    if not arguments or arguments[0].startswith("-"):
        print(
            "usage: python -m learner (CONFIG | --resume FOLDER) [key.sub=value ...]",
            file=sys.stderr,
        )
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        if torchrun_rank()[0] > 0:
            # Rank 0 says what to load.
            from learner.run.follower import run_follower

            run_follower()
            return 0
        if resume:
            folder, config = RunFolder.resume(Path(arguments[0]), arguments[1:])
        else:
            config = load_config(Path(arguments[0]), arguments[1:])
            folder = RunFolder.create(config)
        # Only now torch: a mistake in the configuration is told at once.
        from learner.run.process import run_learner

        summary = run_learner(config, folder, resume=resume)
    except KeyboardInterrupt:
        return 130
    except AsyncGdpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    # Like the shell's code for an interrupted program: it must not look finished.
    return 0 if summary.completed else 130


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
