"""Hook points: names, axes, places and listeners. They know no model and no module."""

from clearspan.points.catalogue import RAW_ENDS as RAW_ENDS
from clearspan.points.catalogue import VOCABULARY as VOCABULARY
from clearspan.points.catalogue import Entry as Entry
from clearspan.points.catalogue import entry_of as entry_of
from clearspan.points.catalogue import is_in_vocabulary as is_in_vocabulary
from clearspan.points.catalogue import template_of as template_of
from clearspan.points.hook_point import Direction as Direction
from clearspan.points.hook_point import HookFunction as HookFunction
from clearspan.points.hook_point import HookPoint as HookPoint
from clearspan.points.hook_point import Listener as Listener
from clearspan.points.hook_point import Stretch as Stretch
from clearspan.points.names import NamesFilter as NamesFilter
from clearspan.points.names import get_act_name as get_act_name
from clearspan.points.names import is_short_name as is_short_name
from clearspan.points.names import nearest as nearest
from clearspan.points.place import Access as Access
from clearspan.points.place import Converted as Converted
from clearspan.points.place import Derivation as Derivation
from clearspan.points.place import Derived as Derived
from clearspan.points.place import InPlace as InPlace
from clearspan.points.place import Layout as Layout
from clearspan.points.place import Place as Place
from clearspan.points.place import SharedRow as SharedRow
from clearspan.points.place import Side as Side
from clearspan.points.place import Whole as Whole
from clearspan.points.place import read as read
