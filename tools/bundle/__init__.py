"""The package and the wheels that it needs, in one folder, for machines without a network.

    wheel of this repository ──► requirements whose markers hold on the target ──► pip download
              ▲                                                                       │
              └──────────── requirements of what came, but of nothing left out ◄──────┘

pip alone cannot do it: it asks the markers of the machine that it runs on, not those of the target,
and has no way to leave out a package and what only that one needs (torch, with gigabytes of CUDA,
where the target has its own).
"""
