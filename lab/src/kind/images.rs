//! The images: the daemons' from `images/`, those of the scenarios from `kind-scenarios/images/`.

use super::{Kind, KindCluster};
use crate::error::Result;

/// Name, Dockerfile, and the stage in it.
const IMAGES: [(&str, &str, Option<&str>); 4] = [
    ("isthmus.io/clustermesh-apiserver:dev", "images/clustermesh-apiserver/Dockerfile", None),
    ("isthmus.io/node-agent:dev", "images/node-agent/Dockerfile", None),
    ("isthmus.io/echo", "kind-scenarios/images/Dockerfile", Some("echo")),
    ("isthmus.io/client", "kind-scenarios/images/Dockerfile", Some("client")),
];

impl Kind {
    /// Builds all of them. Docker builds anew only what has changed.
    pub(super) async fn build_images(&self) -> Result<()> {
        let repository = self.tools.repository.to_string_lossy().into_owned();
        for (name, file, stage) in IMAGES {
            let file = self.tools.repository.join(file).to_string_lossy().into_owned();
            let mut args = vec!["build", "--tag", name, "--file", &file];
            args.extend(stage.iter().flat_map(|stage| ["--target", stage]));
            args.push(&repository);
            self.docker(&args).await?;
        }
        Ok(())
    }

    /// Copies them into the nodes of a cluster.
    pub(super) async fn load_images(&self, cluster: &KindCluster) -> Result<()> {
        let mut args = vec!["load", "docker-image"];
        args.extend(IMAGES.map(|(name, _, _)| name));
        args.extend(["--name", &cluster.kind]);
        crate::command::output(self.kind(&args), None, super::CREATE).await.map(drop)
    }
}
