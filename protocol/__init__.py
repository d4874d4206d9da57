"""What learner and actors say to each other, without any model library."""
