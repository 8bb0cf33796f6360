"""One run of a model: prompts in, hooks on, captures out."""

from microtome.run._batch import Batch as Batch
from microtome.run._batch import Prompt as Prompt
from microtome.run._batch import pad_id as pad_id
from microtome.run._batch import prompt_from_text as prompt_from_text
from microtome.run._batch import to_batch as to_batch
from microtome.run._codec import Codec as Codec
from microtome.run._codec import Encoding as Encoding
from microtome.run._codec import require_text as require_text
from microtome.run._core import LoadedModel as LoadedModel
from microtome.run._fingerprint import Fingerprint as Fingerprint
from microtome.run._forward import Capture as Capture
from microtome.run._forward import addresses as addresses
from microtome.run._forward import refusing_gaps as refusing_gaps
from microtome.run._forward import run_forward as run_forward
from microtome.run._generation import Generation as Generation
from microtome.run._plan import FIXED as FIXED
from microtome.run._plan import Plan as Plan
from microtome.run._plan import free_memory as free_memory
from microtome.run._plan import in_bytes as in_bytes
from microtome.run._plan import plan_of as plan_of
from microtome.run._result import Run as Run
from microtome.run._session import Observer as Observer
from microtome.run._session import Session as Session
