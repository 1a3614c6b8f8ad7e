//! Whose clients a gateway lets in: an authority is believed the names it may vouch for, and no others.

use isthmus_kvstore::{
    client::steps::{TlsProblem, Why},
    gateway::{Trust, Vouches},
};

use crate::{
    mint::{Mint, Minted, Wanted},
    place::{Place, peer, trust, try_to_connect, until},
};

/// A gateway of alpha that has exchanged authorities with beta and gamma. All of them have the same name.
struct Mesh {
    alpha: Mint,
    beta: Mint,
    gamma: Mint,
    place: Place,
}

impl Mesh {
    async fn start() -> Self {
        let [alpha, beta, gamma] = [(); 3].map(|()| Mint::new("Cilium CA"));
        let place = Place::of(&alpha).await;
        let mesh = Self { alpha, beta, gamma, place };
        mesh.place.tls.set_trust(mesh.trust()).unwrap();
        mesh
    }

    fn trust(&self) -> Trust {
        trust(&[(&self.alpha, Vouches::Anyone), (&self.beta, peer("beta")), (&self.gamma, peer("gamma"))])
    }

    async fn try_as(&self, client: &Minted) -> Result<etcd_client::Client, TlsProblem> {
        try_to_connect(&self.place.config(&self.alpha, client)).await
    }

    async fn accepts(&self, client: &Minted) -> etcd_client::Client {
        let mut client = self.try_as(client).await.unwrap_or_else(|problem| panic!("{problem}"));
        client.get("cilium/.heartbeat", None).await.unwrap();
        client
    }

    /// How the client is refused.
    async fn refuses(&self, what: &str, client: &Minted) -> Why {
        match self.try_as(client).await {
            Err(TlsProblem::Refused { why, certificate: Some(_), .. }) => why,
            Err(other) => panic!("{what}: refused otherwise: {other}"),
            Ok(_) => panic!("{what}: let in"),
        }
    }
}

#[tokio::test]
async fn each_authority_speaks_for_its_own_cluster() {
    let mesh = Mesh::start().await;
    for name in ["remote", "remote-beta"] {
        mesh.accepts(&mesh.beta.mint(Wanted::client(name))).await;
    }
    mesh.accepts(&mesh.gamma.mint(Wanted::client("remote-gamma"))).await;
    for name in ["remote", "remote-beta", "local-alpha", "agent-alpha", "admin-alpha"] {
        mesh.accepts(&mesh.alpha.mint(Wanted::client(name))).await;
    }
    let between = mesh.beta.below("Beta's issuer");
    mesh.accepts(&between.mint(Wanted::client("remote-beta"))).await;
}

#[tokio::test]
async fn a_peers_authority_is_not_believed_what_it_says_of_others() {
    let mesh = Mesh::start().await;
    let names = [
        "remote-gamma",
        "remote-alpha",
        "remote-",
        "remote-beta2",
        "remote-betà",
        "Remote-beta",
        " remote-beta",
        "remote-beta ",
        "remote-beta\0",
        "remote-beta\0remote-gamma",
        "local",
        "local-alpha",
        "agent-alpha",
        "admin-alpha",
        "root",
        "Cilium CA",
        "",
    ];
    for name in names {
        let direct = mesh.beta.mint(Wanted::client(name));
        assert_eq!(mesh.refuses(name, &direct).await, Why::Certificate, "{name:?}");
        let through = mesh.beta.below("Cilium CA").mint(Wanted::client(name));
        assert_eq!(mesh.refuses(name, &through).await, Why::Certificate, "{name:?} from an authority below");
    }
    for names in
        [&["remote-beta", "remote-gamma"][..], &["remote-gamma", "remote-beta"], &["remote-beta"; 2], &[]]
    {
        let several = mesh.beta.mint(Wanted::client("").common_names(names));
        assert_eq!(mesh.refuses("several names, or none", &several).await, Why::Certificate, "{names:?}");
    }
    let several = mesh.alpha.mint(Wanted::client("").common_names(&["remote-beta", "admin-alpha"]));
    assert_eq!(mesh.refuses("several names from the own authority", &several).await, Why::Certificate);
}

#[tokio::test]
async fn what_is_wrong_with_the_certificate_itself_is_refused_whoever_signed_it() {
    let mesh = Mesh::start().await;
    for (authority, name) in [(&mesh.beta, "remote-beta"), (&mesh.alpha, "admin-alpha")] {
        let expired = authority.mint(Wanted::client(name).valid(-30, -1));
        assert_eq!(mesh.refuses("expired", &expired).await, Why::Validity);
        let early = authority.mint(Wanted::client(name).valid(1, 30));
        assert_eq!(mesh.refuses("not valid yet", &early).await, Why::Validity);
        let server = authority.mint(Wanted::client(name).for_servers());
        assert_eq!(mesh.refuses("a server's", &server).await, Why::Certificate);
        let usurped = authority.usurper(Wanted::client(name)).mint(Wanted::client(name));
        mesh.refuses("signed by a client", &usurped).await;
        let stranger = Mint::new("Cilium CA").mint(Wanted::client(name));
        assert_eq!(mesh.refuses("signed by one of the same name", &stranger).await, Why::Authority);
        let stranger = Mint::new("Somebody").mint(Wanted::client(name));
        assert_eq!(mesh.refuses("signed by nobody known", &stranger).await, Why::Authority);
    }
}

#[tokio::test]
async fn a_peer_that_is_no_longer_trusted_is_disconnected_and_nobody_else() {
    let mesh = Mesh::start().await;
    let mut beta = mesh.accepts(&mesh.beta.mint(Wanted::client("remote-beta"))).await;
    let mut gamma = mesh.accepts(&mesh.gamma.mint(Wanted::client("remote-gamma"))).await;
    let mut own = mesh.accepts(&mesh.alpha.mint(Wanted::client("agent-alpha"))).await;
    let mut watch = beta.watch("cilium/.heartbeat", None).await.unwrap();
    assert!(watch.message().await.unwrap().unwrap().created());

    let without_beta = trust(&[(&mesh.alpha, Vouches::Anyone), (&mesh.gamma, peer("gamma"))]);
    mesh.place.tls.set_trust(without_beta).unwrap();
    until("beta is disconnected", async || beta.get("cilium/.heartbeat", None).await.is_err()).await;
    assert!(!matches!(watch.message().await, Ok(Some(_))), "its watch has ended too");
    assert_eq!(mesh.refuses("beta", &mesh.beta.mint(Wanted::client("remote-beta"))).await, Why::Authority);
    gamma.get("cilium/.heartbeat", None).await.unwrap();
    own.get("cilium/.heartbeat", None).await.unwrap();

    mesh.place.tls.set_trust(mesh.trust()).unwrap();
    mesh.accepts(&mesh.beta.mint(Wanted::client("remote-beta"))).await;
}

#[tokio::test]
async fn an_authority_may_be_exchanged_with_an_overlap_and_nobody_loses_a_watch() {
    let mesh = Mesh::start().await;
    let mut client = mesh.accepts(&mesh.beta.mint(Wanted::client("remote-beta"))).await;
    let mut watch = client.watch("cilium/.heartbeat", None).await.unwrap();
    assert!(watch.message().await.unwrap().unwrap().created());
    let next = Mint::new("Cilium CA");
    let both = trust(&[(&mesh.alpha, Vouches::Anyone), (&next, Vouches::Anyone), (&mesh.beta, peer("beta"))]);
    mesh.place.tls.set_trust(both).unwrap();
    let server = next.mint(Wanted::server(&["127.0.0.1"]));
    mesh.place.identity.replace(&server.certificate, &server.key).unwrap();

    let agent = next.mint(Wanted::client("agent-alpha"));
    assert!(
        matches!(mesh.try_as(&agent).await, Err(TlsProblem::UnknownIssuer { .. })),
        "who knows the old authority alone does not take the new certificate"
    );
    try_to_connect(&mesh.place.config(&next, &agent)).await.unwrap_or_else(|problem| panic!("{problem}"));
    try_to_connect(&mesh.place.config(&next, &mesh.alpha.mint(Wanted::client("agent-alpha"))))
        .await
        .unwrap_or_else(|problem| panic!("{problem}"));
    mesh.place.store.put("cilium/.heartbeat", "now");
    let event = watch.message().await.unwrap().unwrap();
    assert_eq!(event.events().len(), 1, "the watch has lived through it all");
}

#[tokio::test]
async fn trust_that_cannot_be_used_is_named_and_changes_nothing() {
    let mesh = Mesh::start().await;
    let mut broken = mesh.trust();
    broken.authorities[1].pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".into();
    let error = mesh.place.tls.set_trust(broken.clone()).unwrap_err().to_string();
    assert!(error.contains("cluster beta"), "{error}");
    assert!(broken.authorities[1].check().is_err() && broken.authorities[0].check().is_ok());
    broken.authorities[1].pem = "nothing".into();
    let error = mesh.place.tls.set_trust(broken).unwrap_err().to_string();
    assert!(error.contains("cluster beta") && error.contains("no PEM certificate"), "{error}");
    let error = mesh.place.tls.set_trust(Trust::default()).unwrap_err().to_string();
    assert!(error.contains("no client could connect"), "{error}");
    mesh.accepts(&mesh.beta.mint(Wanted::client("remote-beta"))).await;
}
