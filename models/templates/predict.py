# %% [markdown]
# __BADGE__
#
# # Ask about a scan
#
# Gives a trained model or the vote a scan of your own, and says how far to believe the answer: whether the image is
# like those that the model knows, how often such answers were right, how small a change of the pixels turns the answer
# around, and where the model looked.
#
# - **Needs** a model in `checkpoints/` that `python -m utils calibrate` has prepared, as the committed ones are.
#   Whole heads and DICOM need `env/requirements-scans.txt`, too.
# - **Takes** about half a minute for a slice and a minute for a whole head on two CPU cores, most of it for the attack.
# - **Not for clinical use.** Research code; nothing here may inform a diagnosis.

__SETUP__

# %% [markdown]
# ## Parameters
#
# __INJECTED__

# %% tags=["parameters"]
scan = ""  # a slice, a folder, a NIfTI or DICOM file; "" takes a head of Debian's mricron-data, else a phantom
model_name = "ResNet34"  # a folder in checkpoints/; "Ensemble" asks the vote
together = False  # all slices of the folder are one patient's
fit = "pad"  # how a picture of another shape is fitted: "pad" or "stretch"
stripped = False  # volumes show nothing but the brain already
modality = "T1"  # of volumes: "T1", "T2", "FLAIR", "PET" or "CT"
force = False  # answer what the gate refuses, too
out_dir = ""  # "" takes this repository's checkpoints/

# %%
from utils import utils_funcs as uf

workspace = uf.Workspace.open(out_dir)
predictor = uf.Predictor(workspace, workspace.checkpoint(model_name))
reading = uf.Reading(
    predictor.gate.shape,
    fit=fit,
    together=together,
    stripping=uf.Stripping(stripped=stripped),
    modality=modality,
)
print(f"{predictor.title}: classes {', '.join(predictor.classes)}, trained on {predictor.calibration.source}")

# %% [markdown]
# ## The answer
#
# First the gate. An image that is over a tenth farther from every kept training slice than any validation slice is gets
# no answer: a network has one for noise, too. A phantom is refused by models of real brains, as it should be.

# %%
cases = list(uf.read_cases(scan or uf.example_scan(), reading))
answers = [uf.answer_case(predictor, case, force=force) for case in cases]
for answer, _ in answers:
    print(f"{answer.case}:", *uf.told(answer), sep="\n  ")

# %% [markdown]
# How to read it: above, the slice, the places that weighed most for the answer, and the answer in words; below, the
# smallest attack that turned it around, what it changed, and the probabilities before and after.

# %%
answer, seen = answers[0]
uf.plot_answer(answer, seen, predictor.classes)

# %% [markdown]
# ## Yours
#
# Upload a slice or a NIfTI file; its answer comes below. The slider attacks it within a radius of your choice. This
# cell needs a running kernel: as a page it is empty.

# %%
uf.answer_explorer(predictor, reading, force=force)

# %% [markdown]
# ## What we found

# %%
print(uf.answers_found([answer for answer, _ in answers]))

# %%
uf.answers_table([answer for answer, _ in answers])
