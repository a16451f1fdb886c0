"""An authentication plugin for Cloister: refuses requests for some paths.

It speaks Envoy's external authorization (ext_authz) over gRPC on the unix socket that
CLOISTER_PLUGIN_SOCKET names, and the gRPC health service beside it. Its configuration, the object
`config` of the EnclaveConfig, comes in CLOISTER_PLUGIN_CONFIG: {"refuse": ["/admin"]}.
"""

import json
import os
import posixpath
import signal
from concurrent import futures
from urllib.parse import unquote

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.auth.v3 import external_auth_pb2, external_auth_pb2_grpc
from envoy.type.v3 import http_status_pb2
from google.rpc import code_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


class PathGuard(external_auth_pb2_grpc.AuthorizationServicer):
    def __init__(self, refuse):
        self.refuse = [prefix.rstrip("/") for prefix in refuse]

    def Check(self, request, context):
        # As a server reads it: /a/../admin, //admin and /%61dmin are /admin.
        path = unquote(request.attributes.request.http.path.split("?", 1)[0])
        path = posixpath.normpath("/" + path.lstrip("/"))
        if any(path == prefix or path.startswith(prefix + "/") for prefix in self.refuse):
            return external_auth_pb2.CheckResponse(
                status=status_pb2.Status(code=code_pb2.PERMISSION_DENIED),
                denied_response=external_auth_pb2.DeniedHttpResponse(
                    status=http_status_pb2.HttpStatus(code=403),
                    headers=[header("x-refused-by", "pathguard")],
                    body="this path is closed\n",
                ),
            )
        return external_auth_pb2.CheckResponse(
            status=status_pb2.Status(code=code_pb2.OK),
            ok_response=external_auth_pb2.OkHttpResponse(headers=[header("x-path-checked", "yes")]),
        )


def header(key, value):
    return base_pb2.HeaderValueOption(header=base_pb2.HeaderValue(key=key, value=value))


def main():
    config = json.loads(os.environ.get("CLOISTER_PLUGIN_CONFIG", "{}"))
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    external_auth_pb2_grpc.add_AuthorizationServicer_to_server(PathGuard(config.get("refuse", [])), server)
    status = health.HealthServicer()
    status.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    server.add_insecure_port("unix:" + os.environ["CLOISTER_PLUGIN_SOCKET"])
    server.start()
    # The first process of a pid namespace gets only the signals that it asks for.
    signal.signal(signal.SIGTERM, lambda *_: server.stop(grace=1))
    server.wait_for_termination()


if __name__ == "__main__":
    main()
