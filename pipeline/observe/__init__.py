"""What a run shows: reports, log lines, speed and pictures; and checks of the machine."""

from pipeline.observe.background import trackers_hang
from pipeline.observe.doctor import Needs, preflight
from pipeline.observe.logs import at_round, set_up, title
from pipeline.observe.monitor import Monitor
from pipeline.observe.pictures import grid, heat, png, rows, scatter, to_image
from pipeline.observe.speed import Profiler, fit_flops, forward_flops, parse_rounds, peak_flops, peak_memory
from pipeline.observe.trackers import Tracker, accelerated
