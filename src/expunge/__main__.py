"""``python -m expunge``, for launchers that start modules: ``accelerate launch -m expunge unlearn ...``."""

from expunge.cli.main import main

if __name__ == "__main__":
    main()
