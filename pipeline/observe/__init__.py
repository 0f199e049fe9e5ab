"""What a run shows: reports, log lines, speed and pictures; and checks of the machine."""

from pipeline.observe.doctor import preflight
from pipeline.observe.logs import at_round, set_up, title
from pipeline.observe.monitor import Monitor, trackers_hang
from pipeline.observe.pictures import grid, png, rows, scatter, to_image
from pipeline.observe.speed import Profiler, fit_flops, forward_flops, parse_rounds, peak_flops, peak_memory
from pipeline.observe.trackers import Tracker, accelerated
