"""Field names of the interfaces that `cluster/` writes to, and a check of a document against them.

Types are `str`, `int`, `bool`, `float`, `map` (free keys, strings as values), another entry of the table, or `[x]` for
a list of x. Of the large interfaces only the fields are here that such files use, with the types of their sources:

- KUBERAY: every field of each type, from the API reference of KubeRay v1.7.0 (docs/reference/api.md); what it takes
  from Kubernetes (pods, metadata, network policies) from the models of the Python client 37.0.2.
- EC2: `RunInstances` in botocore 1.43.117, with `SubnetIds`, which Ray turns into one `SubnetId`.
- COMPUTE: `Instance` in compute.v1.json of google-api-python-client 2.202.0.
"""

KUBERAY = {
    "RayCluster": "apiVersion:str kind:str metadata:ObjectMeta spec:RayClusterSpec",
    "RayClusterSpec": "upgradeStrategy:UpgradeStrategy authOptions:AuthOptions suspend:bool managedBy:str "
    "autoscalerOptions:AutoscalerOptions headServiceAnnotations:map enableInTreeAutoscaling:bool "
    "gcsFaultToleranceOptions:GcsFaultToleranceOptions historyServerOptions:HistoryServerOptions "
    "networkPolicy:NetworkPolicyConfig tlsOptions:TLSOptions headGroupSpec:HeadGroupSpec rayVersion:str "
    "workerGroupSpecs:[WorkerGroupSpec]",
    "AuthOptions": "enableK8sTokenAuth:bool secretName:str mode:str",
    "AutoscalerOptions": "resources:ResourceRequirements image:str imagePullPolicy:str securityContext:SecurityContext "
    "idleTimeoutSeconds:int upscalingMode:str version:str env:[EnvVar] envFrom:[EnvFromSource] "
    "volumeMounts:[VolumeMount] command:[str] args:[str]",
    "HeadGroupSpec": "template:PodTemplateSpec headService:Service enableIngress:bool ingressOptions:IngressOptions "
    "resources:map labels:map rayStartParams:map serviceType:str",
    "WorkerGroupSpec": "suspend:bool groupName:str replicas:int minReplicas:int maxReplicas:int idleTimeoutSeconds:int "
    "priority:int resources:map labels:map rayStartParams:map template:PodTemplateSpec scaleStrategy:ScaleStrategy "
    "numOfHosts:int",
    "RayJob": "apiVersion:str kind:str metadata:ObjectMeta spec:RayJobSpec",
    "RayJobSpec": "activeDeadlineSeconds:int backoffLimit:int rayClusterSpec:RayClusterSpec "
    "submitterPodTemplate:PodTemplateSpec metadata:map clusterSelector:map submitterConfig:SubmitterConfig "
    "managedBy:str deletionStrategy:DeletionStrategy entrypoint:str runtimeEnvYAML:str jobId:str submissionMode:str "
    "entrypointResources:str entrypointNumCpus:float entrypointNumGpus:float ttlSecondsAfterFinished:int "
    "preRunningDeadlineSeconds:int shutdownAfterJobFinishes:bool suspend:bool",
    "SubmitterConfig": "backoffLimit:int",
    "RayService": "apiVersion:str kind:str metadata:ObjectMeta spec:RayServiceSpec",
    "RayServiceSpec": "rayClusterDeletionDelaySeconds:int serviceUnhealthySecondThreshold:int serveService:Service "
    "deploymentUnhealthySecondThreshold:int upgradeStrategy:RayServiceUpgradeStrategy serveConfigV2:str "
    "rayClusterConfig:RayClusterSpec excludeHeadPodFromServeSvc:bool managedBy:str suspend:bool",
    # Kubernetes
    "ObjectMeta": "annotations:map labels:map name:str namespace:str",
    "PodTemplateSpec": "metadata:ObjectMeta spec:PodSpec",
    "PodSpec": "automountServiceAccountToken:bool containers:[Container] nodeSelector:map priorityClassName:str "
    "restartPolicy:str serviceAccountName:str terminationGracePeriodSeconds:int tolerations:[Toleration] "
    "volumes:[Volume]",
    "Container": "args:[str] command:[str] env:[EnvVar] image:str imagePullPolicy:str name:str "
    "resources:ResourceRequirements securityContext:SecurityContext volumeMounts:[VolumeMount] workingDir:str",
    "VolumeMount": "mountPath:str name:str readOnly:bool",
    "Volume": "name:str secret:SecretVolumeSource",
    "SecretVolumeSource": "secretName:str",
    "EnvVar": "name:str value:str",
    "ResourceRequirements": "limits:map requests:map",
    "SecurityContext": "allowPrivilegeEscalation:bool capabilities:Capabilities privileged:bool "
    "readOnlyRootFilesystem:bool runAsGroup:int runAsNonRoot:bool runAsUser:int",
    "Capabilities": "add:[str] drop:[str]",
    "Toleration": "effect:str key:str operator:str tolerationSeconds:int value:str",
    "Namespace": "apiVersion:str kind:str metadata:ObjectMeta",
    "ServiceAccount": "apiVersion:str automountServiceAccountToken:bool kind:str metadata:ObjectMeta",
    "NetworkPolicy": "apiVersion:str kind:str metadata:ObjectMeta spec:NetworkPolicySpec",
    "NetworkPolicySpec": "ingress:[NetworkPolicyIngressRule] podSelector:LabelSelector policyTypes:[str]",
    "NetworkPolicyIngressRule": "from:[NetworkPolicyPeer] ports:[NetworkPolicyPort]",
    "NetworkPolicyPort": "endPort:int port:int protocol:str",
    "NetworkPolicyPeer": "namespaceSelector:LabelSelector podSelector:LabelSelector",
    "LabelSelector": "matchExpressions:[LabelSelectorRequirement] matchLabels:map",
    "LabelSelectorRequirement": "key:str operator:str values:[str]",
    # The operator of Prometheus, monitoring.coreos.com/v1
    "PodMonitor": "apiVersion:str kind:str metadata:ObjectMeta spec:PodMonitorSpec",
    "PodMonitorSpec": "jobLabel:str podMetricsEndpoints:[PodMetricsEndpoint] podTargetLabels:[str] "
    "selector:LabelSelector",
    "PodMetricsEndpoint": "interval:str path:str port:str scheme:str scrapeTimeout:str",
}

EC2 = {
    "RunInstances": "BlockDeviceMappings:[BlockDeviceMapping] IamInstanceProfile:IamInstanceProfile ImageId:str "
    "InstanceMarketOptions:InstanceMarketOptions InstanceType:str KeyName:str MetadataOptions:MetadataOptions "
    "SecurityGroupIds:[str] SubnetIds:[str] UserData:str",
    "BlockDeviceMapping": "DeviceName:str Ebs:EbsBlockDevice",
    "EbsBlockDevice": "DeleteOnTermination:bool Encrypted:bool Iops:int Throughput:int VolumeSize:int VolumeType:str",
    "IamInstanceProfile": "Arn:str Name:str",
    "InstanceMarketOptions": "MarketType:str SpotOptions:SpotOptions",
    "SpotOptions": "InstanceInterruptionBehavior:str MaxPrice:str SpotInstanceType:str",
    "MetadataOptions": "HttpEndpoint:str HttpPutResponseHopLimit:int HttpTokens:str InstanceMetadataTags:str",
}

COMPUTE = {
    "Instance": "disks:[AttachedDisk] guestAccelerators:[AcceleratorConfig] machineType:str metadata:Metadata "
    "networkInterfaces:[NetworkInterface] scheduling:Scheduling serviceAccounts:[ServiceAccount] tags:Tags",
    "AttachedDisk": "autoDelete:bool boot:bool initializeParams:InitializeParams type:str",
    "InitializeParams": "diskSizeGb:int diskType:str sourceImage:str",  # the size is an int64, which may be quoted
    "Scheduling": "automaticRestart:bool instanceTerminationAction:str onHostMaintenance:str preemptible:bool "
    "provisioningModel:str",
    "ServiceAccount": "email:str scopes:[str]",
}

_SCALARS = {"str": str, "int": int, "bool": bool, "float": float}


def wrong_fields(value: object, kind: str, table: dict[str, str], where: str = "") -> list[str]:
    """List the fields of `value` that `kind` does not have, or has with another type, each by its dotted path."""
    where = where or kind
    if kind.startswith("["):
        if not isinstance(value, list):
            return [f"{where}: not a list"]
        return [w for i, item in enumerate(value) for w in wrong_fields(item, kind[1:-1], table, f"{where}[{i}]")]
    if kind in _SCALARS:
        return [] if type(value) is _SCALARS[kind] else [f"{where}: {value!r} is no {kind}"]
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no {kind}"]
    if kind == "map":
        return [w for key, item in value.items() for w in wrong_fields(item, "str", table, f"{where}.{key}")]
    fields = dict(field.split(":") for field in table[kind].split())
    return [
        wrong
        for key, item in value.items()
        for wrong in (
            wrong_fields(item, fields[key], table, f"{where}.{key}")
            if key in fields
            else [f"{where}.{key}: no such field"]
        )
    ]
