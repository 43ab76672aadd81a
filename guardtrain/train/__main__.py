"""What `accelerate launch … -m guardtrain.train RECIPE [key=value …]` runs on each rank."""

from guardtrain.cli import train_main

if __name__ == "__main__":
    train_main()
