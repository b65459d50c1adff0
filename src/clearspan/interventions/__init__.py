"""Interventions: what is done to which value of a run, as data that can be compared, stored and run again."""

from clearspan.interventions.actions import Action as Action
from clearspan.interventions.actions import Add as Add
from clearspan.interventions.actions import Apply as Apply
from clearspan.interventions.actions import Inject as Inject
from clearspan.interventions.actions import Mask as Mask
from clearspan.interventions.actions import Mean as Mean
from clearspan.interventions.actions import Patch as Patch
from clearspan.interventions.actions import PatchSubspace as PatchSubspace
from clearspan.interventions.actions import ProjectOut as ProjectOut
from clearspan.interventions.actions import Resample as Resample
from clearspan.interventions.actions import Scale as Scale
from clearspan.interventions.actions import SourcePosition as SourcePosition
from clearspan.interventions.actions import Zero as Zero
from clearspan.interventions.actions import derangement as derangement
from clearspan.interventions.actions import exchanged as exchanged
from clearspan.interventions.actions import parse_action as parse_action
from clearspan.interventions.constant import Constant as Constant
from clearspan.interventions.functions import register_function as register_function
from clearspan.interventions.intervention import Intervention as Intervention
from clearspan.interventions.site import Site as Site
from clearspan.interventions.site import Taken as Taken
from clearspan.interventions.site import Written as Written
from clearspan.interventions.site import located as located
