"""A training run, watched: statistics of every parameter at every step."""

from isograd.monitor.clipping import AdaptiveClip as AdaptiveClip
from isograd.monitor.guard import Guard as Guard
from isograd.monitor.monitor import Monitor as Monitor
from isograd.monitor.monitor import watch as watch
from isograd.monitor.reading import Reading as Reading
