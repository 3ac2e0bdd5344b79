"""What a plan reads lies in the files of its folder."""

import pytest

from shardplan.specs import Folder, Loaded, Mesh, ParamSpec, Part, Plan, PlanError, SpecTree, StoredFile, StoredTensor

STORED = StoredTensor("model.safetensors", "w", 64, (4,), "float32")
TREE = SpecTree([ParamSpec("w", (4,), "float32", source=Loaded((Part.whole(STORED),)))])


@pytest.mark.parametrize("folder", [None, Folder("llama", (StoredFile("other.safetensors", 80),))])
def test_a_tensor_of_a_file_that_the_folder_does_not_name_is_refused(folder):
    with pytest.raises(PlanError, match=r"w  f32\[4\]: it is read from 'model.safetensors', which is no file of the plan's"):
        Plan(Mesh(), TREE, (), folder=folder)


def test_a_folder_that_names_it_is_taken():
    folder = Folder("llama", (StoredFile("model.safetensors", 80),))
    assert Plan(Mesh(), TREE, (), folder=folder).folder is folder


@pytest.mark.parametrize("wrong", [{"offset": -1}, {"dtype": "quint4x2"}, {"shape": (-4,)}])
def test_nonsense_is_no_stored_tensor(wrong):
    with pytest.raises(ValueError, match=r"offset|quint4x2|shape"):
        StoredTensor(**{"file": "f", "key": "w", "offset": 0, "shape": (4,), "dtype": "float32"} | wrong)
