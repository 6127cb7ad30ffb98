"""A training run, watched: statistics of every parameter at every step."""

from isograd.monitor.monitor import Monitor as Monitor
from isograd.monitor.monitor import watch as watch
from isograd.monitor.reading import Reading as Reading
