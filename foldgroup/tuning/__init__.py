"""What grouped convolutions really cost: measured in the runtime that will run them, kept, or else predicted."""
