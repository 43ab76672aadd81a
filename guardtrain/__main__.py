"""`python -m guardtrain`: what a launcher starts."""

from guardtrain.cli import main

if __name__ == "__main__":
    main()
