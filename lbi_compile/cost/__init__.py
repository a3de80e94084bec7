"""What a training step costs on many devices: closed forms, their numbers, and the schedules as graphs of tasks."""

from __future__ import annotations

from . import pipelines, regions
from .bounded import BOUNDED_FORMS
from .dense import DENSE_FORMS
from .form import BOUNDED, DENSE, LOCAL, Estimate, Form
from .symbols import MEANING, Workload, transformer

# By name, in the order of the table.
FORMS = {form.name: form for form in (*DENSE_FORMS, *BOUNDED_FORMS)}
# The same as graphs of tasks: functions of a workload, a link and the shares of layers in each stage or region.
GRAPHS = {
    "one": pipelines.one,
    "data": pipelines.data,
    "gpipe": pipelines.gpipe,
    "1f1b": pipelines.one_f_one_b,
    "zero-bubble": pipelines.zero_bubble,
    "chain": regions.chain,
    "scan": regions.scan,
    "token": regions.token,
    "sid": regions.sid,
    "hbll": regions.hbll,
}

__all__ = ["BOUNDED", "DENSE", "FORMS", "GRAPHS", "LOCAL", "MEANING", "Estimate", "Form", "Workload", "transformer"]
