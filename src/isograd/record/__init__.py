"""The record of a watched training: a directory that can be read while it is written. Needs no torch to read.

run = Run.open("isograd-runs/20260314-091500")
run.progress()              # last step, loss, gradient norm, findings, and whether it is still written
run.series("loss")          # steps and values
isograd.diagnose(run)       # the same Diagnosis as of a model
"""

from isograd.record.database import NotARun as NotARun
from isograd.record.home import home as home
from isograd.record.home import runs as runs
from isograd.record.kept import Progress as Progress
from isograd.record.row import Layout as Layout
from isograd.record.row import Row as Row
from isograd.record.row import Told as Told
from isograd.record.run import Run as Run
