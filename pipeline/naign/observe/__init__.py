"""What a run shows: reports, log lines, speed and pictures; and checks of the machine."""

from naign.observe.doctor import preflight
from naign.observe.logs import at_round, set_up, title
from naign.observe.monitor import Monitor
from naign.observe.pictures import grid, png, rows, to_image
from naign.observe.speed import parse_rounds, peak_memory, profiled
from naign.observe.stragglers import Stragglers
