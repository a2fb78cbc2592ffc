"""The Kubernetes files have no field that KubeRay lacks, and Ray's autoscaler reads them as meant."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from ray import _raylet
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from mowe_ray.config import load_config
from mowe_ray.distributed.ray_serve.deployment import ServiceArguments
from tests.cluster_fields import KUBERAY, wrong_fields

ROOT = Path(__file__).parents[3]
FILES = [f"kuberay-{name}.yaml" for name in ("namespace", "cluster", "job", "service", "monitoring")]


def read(name):
    return list(yaml.safe_load_all((ROOT / "cluster" / name).read_text()))


def cluster():
    return read("kuberay-cluster.yaml")[0]


@pytest.mark.parametrize("name", FILES)
def test_no_field_is_invented(name):
    for document in read(name):
        assert wrong_fields(document, document["kind"], KUBERAY) == []


def test_the_check_sees_a_wrong_field_at_any_depth():
    broken = cluster()
    group = broken["spec"]["workerGroupSpecs"][0]
    group["minWorkers"] = group.pop("minReplicas")
    group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] = 14
    where = "RayCluster.spec.workerGroupSpecs[0]"
    assert sorted(wrong_fields(broken, "RayCluster", KUBERAY)) == [
        f"{where}.minWorkers: no such field",
        f"{where}.template.spec.containers[0].resources.limits.cpu: 14 is no str",
    ]


def test_rays_autoscaler_sees_a_head_without_cpus_and_groups_that_come_from_nothing():
    config = _derive_autoscaling_config_from_ray_cr(cluster())  # raises where Ray's schema says no
    groups = config["available_node_types"]
    assert {name: (group["min_workers"], group["max_workers"]) for name, group in groups.items()} == {
        "headgroup": (0, 0),
        "cpu": (0, 8),
        "gpu": (0, 4),
        "gpu-spot": (0, 4),
    }
    assert groups["headgroup"]["resources"]["CPU"] == 0
    assert "GPU" not in groups["cpu"]["resources"]
    assert groups["gpu"]["resources"] == groups["gpu-spot"]["resources"]
    assert groups["gpu"]["resources"]["GPU"] == 4
    assert config["idle_timeout_minutes"] == 5
    assert [name for name, group in groups.items() if group.get("idle_timeout_s") == 600] == ["gpu", "gpu-spot"]
    markets = {name: group["labels"][_raylet.RAY_NODE_MARKET_TYPE_KEY] for name, group in groups.items()}
    assert markets == {"headgroup": "on-demand", "cpu": "on-demand", "gpu": "on-demand", "gpu-spot": "spot"}
    assert groups["gpu-spot"]["priority"] > groups["gpu"].get("priority", 0)


def test_pods_land_on_the_nodes_that_their_labels_promise_and_have_the_rights_of_their_kind():
    spec = cluster()["spec"]
    accounts = {d["metadata"]["name"] for d in read("kuberay-namespace.yaml") if d["kind"] == "ServiceAccount"}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["nodeSelector"] == {"market": group["labels"][_raylet.RAY_NODE_MARKET_TYPE_KEY]}
        assert pod["restartPolicy"] == "Never"
        expected = "mowe-ray-worker" if "groupName" in group else "mowe-ray-head"
        assert pod["serviceAccountName"] == expected
        assert expected in accounts
        (container,) = pod["containers"]
        assert container["securityContext"]["runAsNonRoot"] is True
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_v2_token_and_version_are_said():
    spec = cluster()["spec"]
    (pin,) = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray==")]
    assert spec["rayVersion"] == pin.removeprefix("ray==")  # KubeRay chooses its health check by it
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["authOptions"] == {"mode": "token"}


def test_the_job_is_a_run_on_the_same_cluster_that_a_retry_resumes():
    (job,) = read("kuberay-job.yaml")
    spec = job["spec"]
    assert spec["rayClusterSpec"] == cluster()["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    command = shlex.split(spec["entrypoint"])
    assert command[:5] == ["python", "-m", "mowe_ray.train", "--config", "paper"]
    config = load_config(command[4], command[5:])
    config.require_data()
    assert "://" in config.storage
    assert config.name == job["metadata"]["name"]


def test_one_namespace_holds_all_and_only_it_reaches_its_pods():
    documents = [document for name in FILES for document in read(name)]
    (namespace,) = [d["metadata"]["name"] for d in documents if d["kind"] == "Namespace"]
    assert {d["metadata"]["namespace"] for d in documents if d["kind"] != "Namespace"} == {namespace}
    policy, metrics = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    assert policy["podSelector"] == {}
    (rule,) = policy["ingress"]
    operator = {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    assert rule["from"] == [{"podSelector": {}}, {"namespaceSelector": {}, "podSelector": operator}]
    (rule,) = metrics["ingress"]
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert rule["ports"] == [{"protocol": "TCP", "port": 8080}]


@pytest.mark.parametrize("name", FILES)
def test_no_file_holds_a_credential_or_opens_a_port_to_the_outside(name):
    assert not {document["kind"] for document in read(name)} & {"Secret", "Ingress", "Service"}
    text = (ROOT / "cluster" / name).read_text()
    assert "LoadBalancer" not in text
    assert "NodePort" not in text
    assert "hostNetwork" not in text


def test_the_service_is_an_application_of_ours_that_asks_for_a_token():
    (service,) = read("kuberay-service.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    builder = getattr(importlib.import_module(module), name)
    arguments = ServiceArguments.model_validate(application.args)
    assert builder.__annotations__["arguments"] in (ServiceArguments, "ServiceArguments")
    spec = service["spec"]["rayClusterConfig"]
    assert spec["rayVersion"] == cluster()["spec"]["rayVersion"]
    assert spec["authOptions"] == {"mode": "token"}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (mount,) = pod["containers"][0]["volumeMounts"]
        assert arguments.token_file == f"{mount['mountPath']}/token"
        assert pod["volumes"][0]["name"] == mount["name"]
    cpus = int(spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert cpus > arguments.cpus  # a replica, and the gateway


def test_the_dashboard_asks_for_figures_that_runs_have():
    asked = set(re.findall(r"ray_mowe_(\w+)", (ROOT / "cluster" / "grafana-dashboard.json").read_text()))
    source = (ROOT / "mowe_ray" / "distributed" / "ray_train" / "ray_metrics.py").read_text()
    assert {name for name in asked if f'"{name}"' not in source} == set()
    assert {"step_seconds", "audio_seconds_per_second", "data_wait_ratio", "router_load", "restarts"} < asked
