"""The learner process: what it is built of, its training loop, its pages and its reports."""
