"""The files for `ray up` mean what cluster/README.md says of them, to Ray and to the clouds."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray import _raylet
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.util.accelerators import accelerators

from tests.cluster_fields import COMPUTE, EC2, wrong_fields

CLUSTER = Path(__file__).parents[3] / "cluster"
CLOUDS = ["aws", "gcp"]
MARKET = _raylet.RAY_NODE_MARKET_TYPE_KEY


def read(cloud):
    """What `ray up` makes of the file, before it asks the cloud for anything."""
    config = prepare_config(yaml.safe_load((CLUSTER / f"{cloud}.yaml").read_text()))
    validate_config(config)
    return config


def shell_commands(config):
    for key in ("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        yield from config[key]
    for node_type in config["available_node_types"].values():
        yield from node_type.get("initialization_commands", [])


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_accepts_the_file_and_nothing_invented(cloud):
    config = read(cloud)
    config["available_node_types"]["cpu"]["max_worker"] = 3
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(config)


@pytest.mark.parametrize(("cloud", "kind", "table"), [("aws", "RunInstances", EC2), ("gcp", "Instance", COMPUTE)])
def test_the_cloud_has_every_field_of_a_machine(cloud, kind, table):
    for name, node_type in read(cloud)["available_node_types"].items():
        assert wrong_fields(node_type["node_config"], kind, table, name) == []
    broken = {**node_type["node_config"], "spot": True}
    assert wrong_fields(broken, kind, table) == [f"{kind}.spot: no such field"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_head_trains_nothing_and_the_rest_comes_from_nothing_and_goes(cloud):
    config = read(cloud)
    types = config["available_node_types"]
    assert list(types) == ["head", "cpu", "gpu", "gpu-spot"]
    assert config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["head"]["max_workers"] == 0
    assert all(node_type["min_workers"] == 0 for node_type in types.values())
    assert all(types[name]["max_workers"] > 0 for name in ("cpu", "gpu", "gpu-spot"))
    assert config["max_workers"] >= sum(node_type["max_workers"] for node_type in types.values())
    assert config["idle_timeout_minutes"] == 5
    assert config["provider"]["cache_stopped_nodes"] is False  # stopped machines cost


@pytest.mark.parametrize("cloud", CLOUDS)
def test_labels_say_which_nodes_are_spot_and_those_are(cloud):
    types = read(cloud)["available_node_types"]
    assert {name: node_type["labels"][MARKET] for name, node_type in types.items()} == {
        "head": "on-demand",
        "cpu": "on-demand",
        "gpu": "on-demand",
        "gpu-spot": "spot",
    }

    def is_spot(machine):
        return (
            machine.get("InstanceMarketOptions") == {"MarketType": "spot"}
            or machine.get("scheduling", {}).get("provisioningModel") == "SPOT"
        )

    assert [name for name, node_type in types.items() if is_spot(node_type["node_config"])] == ["gpu-spot"]
    spot, on_demand = types["gpu-spot"], types["gpu"]
    assert spot["priority"] > on_demand.get("priority", 0)
    machine = "InstanceType" if cloud == "aws" else "machineType"
    assert spot["node_config"][machine] == on_demand["node_config"][machine]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_gpu_type_is_one_that_ray_knows(cloud):
    known = {value for name, value in vars(accelerators).items() if name.startswith("NVIDIA_")}
    types = read(cloud)["available_node_types"]
    gpu_types = {types[name]["labels"][_raylet.RAY_NODE_ACCELERATOR_TYPE_KEY] for name in ("gpu", "gpu-spot")}
    assert len(gpu_types) == 1
    assert gpu_types <= known
    if cloud == "gcp":  # on AWS, Ray looks the resources up
        assert types["gpu"]["resources"] == types["gpu-spot"]["resources"]
        assert types["gpu"]["resources"][f"accelerator_type:{gpu_types.pop()}"] == 1


@pytest.mark.parametrize("cloud", CLOUDS)
def test_autoscaler_v2_reads_the_same(cloud):
    config = read(cloud)
    for node_type in config["available_node_types"].values():  # Ray fills this in from the cloud's catalogue
        node_type["resources"] = node_type["resources"] or {"CPU": 1}
    nodes = AutoscalingConfig(config).get_node_type_configs()
    assert {name: node.idle_timeout_s for name, node in nodes.items()} == {
        "head": None,
        "cpu": None,
        "gpu": 600,
        "gpu-spot": 600,
    }
    assert nodes["gpu-spot"].priority == 1
    assert nodes["gpu-spot"].labels[MARKET] == "spot"


@pytest.mark.slow
@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_node_asks_for_the_token_and_the_head_waits_for_checkpoints(cloud):
    config = read(cloud)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env RAY_JOB_STOP_WAIT_TIME_S=300" in config["docker"]["head_run_options"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_no_file_holds_a_credential_and_all_gaps_are_at_the_top(cloud):
    text = (CLUSTER / f"{cloud}.yaml").read_text()
    config = yaml.safe_load(text)
    assert set(config["provider"]) <= {"type", "region", "availability_zone", "project_id", "cache_stopped_nodes"}
    assert config["auth"] == {"ssh_user": "ubuntu"}
    assert not re.search(r"AKIA|aws_secret|BEGIN [A-Z ]*PRIVATE KEY|password:", text)
    top, _, rest = text.partition("cluster_name:")
    assert "FILL_IN" in top
    assert "FILL_IN" not in rest


def test_machines_have_the_rights_of_the_readme_and_no_default_ones():
    readme = (CLUSTER / "README.md").read_text()
    aws = {n: t["node_config"] for n, t in read("aws")["available_node_types"].items()}
    gcp = {n: t["node_config"]["serviceAccounts"] for n, t in read("gcp")["available_node_types"].items()}
    for name in aws:
        identity = "mowe-ray-head" if name == "head" else "mowe-ray-worker"
        assert aws[name]["IamInstanceProfile"] == {"Name": identity}
        assert aws[name]["SecurityGroupIds"]
        assert aws[name]["MetadataOptions"]["HttpTokens"] == "required"
        assert [account["email"].partition("@")[0] for account in gcp[name]] == [identity]
        assert f"`{identity}`" in readme


@pytest.mark.slow
@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_command_is_shell(cloud):
    for command in shell_commands(read(cloud)):
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_the_region_is_the_same_wherever_it_is_written():
    for cloud, elsewhere in (("aws", "README.md"), ("gcp", "gcp.yaml")):
        region = read(cloud)["provider"]["region"]
        for name in (f"{cloud}.yaml", elsewhere):
            found = set(re.findall(r"\b(?:us|eu|ap)-[a-z]+-?\d\b", (CLUSTER / name).read_text()))
            assert found == {region}, name
