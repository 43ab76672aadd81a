"""`python -m guardtrain …`: the command line, also for `accelerate launch --num_processes N -m guardtrain evaluate …`."""

from guardtrain.cli import main

if __name__ == "__main__":
    main()
