"""Whether each way of computing a step gives the same, on tiny models of many families.

    python -m benchmarks.equality [--families Gemma gpt-oss]

The truth is one sequence after the other through nothing but transformers' model, with its eager
attention and all its logits. Compared with it, or as said, are

    shared         the learner's own way: a prompt once for its group, or what it falls back to
    alone          rows without padding in which each sequence is a tree of its own
    padded         a row for each sequence, padded to the longest
    head           the model's own logits, against head and softmax in chunks (of the learner's way)
    checkpointed   layers computed again in the backward pass, against layers that are kept
    5 steps        weights after five steps of the learner's trainer, against a textbook's loop
    splits         metrics and weights of the same five steps in passes of 4096, 90 and 1 tokens

Each cell has the largest difference of a log-probability and that of a gradient, relative to the
largest gradient of the model. Differences of weights are in units of the learning rate, of which a
weight moves about 5: a single one is far off only where its gradient is 0 but for rounding, of
which Adam takes the sign (GPT-2's biases of keys). float32, one CPU thread.
"""
