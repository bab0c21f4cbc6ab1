# %% [markdown]
# ## Setup
#
# Finds the repository. On Colab it is fetched and its packages are installed first; Colab's own torch stays.

# %%
import subprocess
import sys
from pathlib import Path

REPOSITORY = "__REPOSITORY__"  # on Colab: address of the copy to run, such as https://github.com/<owner>/<name>
HERE = Path.cwd()
ROOT = next((d for d in (HERE, *HERE.parents) if (d / "models" / "def_models.py").is_file()), HERE / "repository")
if "google.colab" in sys.modules and not ROOT.is_dir():
    if not REPOSITORY:
        raise ValueError("set REPOSITORY above to the address of the repository")
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, ROOT], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-qr", ROOT / "env" / "requirements-colab.txt"], check=True)
if not ROOT.is_dir():
    raise FileNotFoundError("open this notebook from inside a clone of the repository")
sys.path.insert(0, str(ROOT))
