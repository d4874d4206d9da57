"""What one GPU can tell in one call of eight minutes: `make gpu`.

    __main__ ──► part machine ──► part step varlen ──► part layouts ──► ...   a process for each
        ◄── a line of JSON for every row, as soon as it is known ──┘

A part that fails, hangs or runs out of memory takes nothing along: what it printed before counts,
and the next one begins. What a part needs and is not installed skips it, by name. The program that
starts the parts needs nothing but Python.
"""
